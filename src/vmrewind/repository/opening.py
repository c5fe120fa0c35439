"""From a repository's URL to its store. What an object store needs is loaded only for the URL of one."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmrewind.errors import RepositoryError
from vmrewind.repository.address import STORES, is_object_store, parse_address
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.store import Store
from vmrewind.repository.url import CREDENTIALS_HINT, holds_credentials, redacted


def open_store(url: str, *, create: bool = False) -> Store:
    """The store that ``url`` names: a directory's path, file://, s3://, gs:// or az://.

    Only with ``create`` is a missing directory made; buckets never are. An object store is not asked anything yet.
    """
    if holds_credentials(url):
        raise RepositoryError(f"{redacted(url)}: the URL holds credentials, which anybody could read in it", CREDENTIALS_HINT)
    if is_object_store(url):
        address = parse_address(url)
        from vmrewind.repository.client import open_object_store

        return open_object_store(address, url)
    scheme, separator, _ = url.partition("://")
    if not separator:
        if not url:
            raise RepositoryError("the repository's URL is empty", "name a directory, or s3://BUCKET, gs://BUCKET, az://CONTAINER")
        return DirectoryStore(Path(url).absolute(), url, create=create)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise RepositoryError(f"{url}: a file URL names no other host", "write file:///path, or just the path")
        return DirectoryStore(Path(unquote(parts.path)), url, create=create)
    known = ", ".join(f"{scheme}://" for scheme in STORES)
    raise RepositoryError(
        f"{scheme}://: repositories are not kept in such places",
        f"name a directory (a path, or file:///path), or a bucket: {known}",
    )
