"""Where a repository in an object store is: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``.

A URL names a place and nothing else. Who may go there is told by the environment (credentials.py): URLs are in configuration files,
process lists and logs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vmrewind.errors import RepositoryError

STORES: Final = {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
"""The schemes, and what they stand for."""

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", re.ASCII)
_COMPONENT: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """A bucket (Azure: container) of a store, and a prefix of keys in it: empty, or ending in ``/``."""

    scheme: str
    bucket: str
    prefix: str


def is_object_store(url: str) -> bool:
    """Whether the URL's scheme is that of an object store."""
    return url.partition(":")[0] in STORES and ":" in url


def parse_address(url: str) -> Address:
    """The address that a URL gives; raises RepositoryError saying what is wrong with it.

    It must not hold credentials (url.py tells): messages repeat it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise RepositoryError(f"{url}: not a URL of an object store", f"write {scheme.rstrip(':')}://BUCKET/PREFIX")
    bucket, _, path = rest.partition("/")
    what = "container" if scheme == "az" else "bucket"
    if not _BUCKET.fullmatch(bucket):
        raise RepositoryError(f"{url}: {bucket!r} is no {what}'s name", f"write {scheme}://{what.upper()} or …/PREFIX")
    components = path.removesuffix("/").split("/") if path else []
    for component in components:
        if not _COMPONENT.fullmatch(component):
            raise RepositoryError(
                f"{url}: {component!r} cannot be part of a prefix",
                "use letters, digits, dots, dashes and underlines, and no // or ..",
            )
    return Address(scheme, bucket, "".join(f"{component}/" for component in components))
