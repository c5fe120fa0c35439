"""What a repository's URL may hold. It is seen in process lists, configurations and messages, so it may hold no secret."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

_USER: Final = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)
CREDENTIALS_HINT: Final = "take them out of it, and where they have been seen already, make new ones"


def holds_credentials(url: str) -> bool:
    """Whether the URL has a user, a password or a query. A plain path may hold any character."""
    return "://" in url and bool(_USER.search(url) or _QUERY.search(url))


def redacted(url: str) -> str:
    """The URL as it may be shown: what may be secret in it is left out."""
    if "://" not in url:
        return url
    return _QUERY.sub("?…", _USER.sub("…@", url))


def anywhere(url: str) -> str:
    """The URL as it is to be written down: a path means the same in every directory."""
    return url if "://" in url else str(Path(url).absolute())


def place_of(url: str) -> str:
    """The same text for every spelling of one place: a directory by its real path, an object store without idle slashes."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return os.path.realpath(url)
    if scheme == "file":
        return os.path.realpath(unquote(urlsplit(url).path))
    return f"{scheme}://{rest.rstrip('/')}"
