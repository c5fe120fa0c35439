"""What an object store's library says went wrong, in words that name the object, the cause and the remedy.

Query strings are left out: in some stores' URLs they are credentials.
"""

from __future__ import annotations

import re
from typing import Final

from vmrewind.errors import RepositoryError, SpaceError, VmrewindError

_STATUS: Final = re.compile(r"status code: (\d{3}[^:\n]*)")
_CODE: Final = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE: Final = re.compile(r"<Message>([^<]*)</Message>")
_JSON_MESSAGE: Final = re.compile(r'"message": *"([^"]*)"')
_NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_FULL: Final = ("QuotaExceeded", "StorageFull", "InsufficientStorage", "507 Insufficient", "AccountQuota")
_GUIDE: Final = "docs/repositories.md"

_CAUSES: Final = (
    # (what its text has, what happened, what to do); the first that fits counts
    (("169.254.169.254", "metadata.google", "fetching credentials", "GOOGLE_APPLICATION_CREDENTIALS"),
     "no credentials were found, and this host gives none of itself", f"give them as {_GUIDE} says, by environment or file"),
    (("dns error",), "the store's host name is not known", "check the endpoint's and the bucket's name, and this host's DNS"),
    (("ConnectionRefused", "Connection refused"), "nothing listens at the store's address",
     "does the store run, is the endpoint right?"),
    (("certificate", "InvalidCertificate"), "the store's certificate is not trusted", f"install its authority's: see {_GUIDE}"),
    (("TimedOut", "timed out", "Timeout"), "the store did not answer in time", "is it up, and the network between?"),
    (("kind: Connect",), "the store cannot be reached", "is it up, the endpoint right, the network between up?"),
)  # fmt: skip


def bucket_is_missing(error: Exception) -> bool:
    """Whether what is missing is not an object but all that could hold it."""
    text = str(error)
    return any(word in text for word in _NO_BUCKET)


def range_is_beyond_end(error: Exception) -> bool:
    """Whether the store may mean that the range begins at or behind the object's end."""
    text = str(error)
    status = _STATUS.search(text)  # and not any 416 in the text: it tells the store's port and how long it took, too
    return (status is not None and status[1].startswith("416")) or "Wanted range" in text


def translated(error: Exception, url: str, key: str, action: str) -> VmrewindError:
    """The error for the user: ``action`` is what could not be done to ``key`` (put, read, listed …)."""
    text = str(error)
    where = f"{url}: {key or 'the bucket'} cannot be {action}"
    status = _STATUS.search(text)
    if any(word in text for word in _FULL):
        return SpaceError(f"{where}: no space left in the store ({_said(text)})", "extend it, or raise its quota")
    if bucket_is_missing(error):
        return RepositoryError(f"{where}: there is no such bucket or container", "check the name, or make it; vmrewind makes none")
    if status is not None and status[1].startswith(("401", "403")):
        return RepositoryError(
            f"{where}: the store refuses ({_said(text)})",
            f"check the credentials, and what they permit: put, get and list objects ({_GUIDE})",
        )
    if not text or isinstance(error, TimeoutError):
        text = "timed out"
    if status is None:
        for words, what, remedy in _CAUSES:
            if any(word in text for word in words):
                return RepositoryError(f"{where}: {what}", remedy)
    return RepositoryError(f"{where}: {_said(text)}", "look at the store's own state and log; what was sent stays as it is")


def _said(text: str) -> str:
    """The store's own words, in short."""
    parts = [found[1].strip() for pattern in (_STATUS, _CODE, _MESSAGE, _JSON_MESSAGE) if (found := pattern.search(text))]
    if not parts:
        parts = [text.partition("\n\n")[0]]
    return re.sub(r"\?\S+", "?…", ": ".join(dict.fromkeys(part for part in parts if part)))[:300]
