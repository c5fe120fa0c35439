"""An object store (S3 and compatible, Google's, Azure's) as a store, through the obstore library.

Objects are put with the condition that there is none of the key, never in parts. A put whose answer is lost may still have
arrived, or arrive later: who repeats it gets AlreadyExists and compares. No call lasts longer than its deadline, whatever the
store does; until a store has answered once, the deadline is short, so that a wrong address is soon known for one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from vmrewind.errors import RepositoryError
from vmrewind.repository import background
from vmrewind.repository.complaints import bucket_is_missing, range_is_beyond_end, translated
from vmrewind.repository.store import AlreadyExists, NotFound

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore as Client

T = TypeVar("T")

_LIST_PAGE: Final = 1000
_BUSY_TRIES: Final = 5
_BUSY_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is waited for: one request, all its repetitions, and in any case."""

    request_seconds: float
    retry_seconds: float
    retries_max: int

    @property
    def deadline_seconds(self) -> float:
        """No call lasts longer. Repetitions begin within ``retry_seconds``; the last one may use its full time."""
        return self.retry_seconds + self.request_seconds + 10

    @property
    def retry_config(self) -> Any:
        """In obstore's words."""
        backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
        return {"max_retries": self.retries_max, "retry_timeout": timedelta(seconds=self.retry_seconds), "backoff": backoff}


AT_FIRST: Final = Patience(15, 10, 2)
LATER: Final = Patience(120, 60, 5)
"""A segment of 8 MiB gets through within a request's time at 0.6 Mbit/s."""

_OUTCOMES: Final = (AlreadyExistsError, PreconditionError, FileNotFoundError)
"""What a store says that works."""


class ObjectStore:
    """Implements :class:`vmrewind.repository.store.Store` in a bucket; keys get ``prefix`` in front there.

    ``connect`` makes the library's client for a patience; nothing is asked of the store before the first operation.
    """

    def __init__(self, connect: Callable[[Patience], Client], url: str, prefix: str) -> None:
        self.url = url
        self._prefix = prefix
        self._connect = connect
        self._patience = AT_FIRST
        self._client = connect(AT_FIRST)

    def put(self, key: str, data: bytes) -> None:
        path = self._prefix + key
        for attempt in range(_BUSY_TRIES):
            try:
                self._run("put", key, lambda client: obstore.put(client, path, data, mode="create", use_multipart=False))
                return
            except (AlreadyExistsError, PreconditionError):
                if self.size(key) is not None:
                    raise AlreadyExists(key) from None
            # A conflict can also mean that another request for this key was under way, and then nothing may have arrived.
            time.sleep(_BUSY_SECONDS * (attempt + 1))
        raise RepositoryError(
            f"{self.url}: {key}: the store refuses it because it exists, and then says that there is none",
            "if the bucket keeps deleted objects (versions, object lock), see docs/repositories.md; else try again",
        )

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            if self.size(key) is None:
                raise NotFound(key)
            return b""
        path = self._prefix + key

        def read(client: Client) -> bytes:
            try:
                if length is not None:
                    return obstore.get_range(client, path, start=offset, length=length).to_bytes()
                options: GetOptions | None = {"range": {"offset": offset}} if offset else None
                return obstore.get(client, path, options=options).bytes().to_bytes()
            except BaseError as error:
                # Stores don't agree on an empty range, so the object's own size decides.
                if range_is_beyond_end(error) and obstore.head(client, path)["size"] <= offset:
                    return b""
                raise

        try:
            return self._run("read", key, read)
        except FileNotFoundError:
            raise NotFound(key) from None

    def size(self, key: str) -> int | None:
        try:
            return self._run("looked up", key, lambda client: obstore.head(client, self._prefix + key)["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        # The library lists by whole components only.
        directory = (self._prefix + prefix).rpartition("/")[0]
        pages = obstore.list(self._client, directory or None, chunk_size=_LIST_PAGE)
        cut = len(self._prefix)
        while page := self._run("listed", prefix, lambda _: next(pages, ())):
            for entry in page:
                key = entry["path"][cut:]
                if key.startswith(prefix):
                    yield key, entry["size"]

    def children(self, prefix: str) -> Sequence[str]:
        directory = (self._prefix + prefix).rstrip("/") or None
        found = self._run("listed", prefix, lambda client: obstore.list_with_delimiter(client, directory)["common_prefixes"])
        return sorted(path.rpartition("/")[2] for path in found)

    def delete(self, key: str) -> None:
        try:
            self._run("deleted", key, lambda client: obstore.delete(client, self._prefix + key))
        except FileNotFoundError:
            return  # some stores say so, others don't

    def _run(self, action: str, key: str, call: Callable[[Client], T]) -> T:
        """Do it within the deadline. Raises the library's words for an outcome, RepositoryError for everything else."""
        client, deadline_seconds = self._client, self._patience.deadline_seconds
        try:
            result = background.run(lambda: call(client), deadline_seconds)
        except _OUTCOMES as error:
            if bucket_is_missing(error):
                raise translated(error, self.url, key, action) from None
            self._has_answered()
            raise
        except (BaseError, TimeoutError, ValueError) as error:
            raise translated(error, self.url, key, action) from None
        self._has_answered()
        return result

    def _has_answered(self) -> None:
        if self._patience is AT_FIRST:
            self._client = self._connect(LATER)
            self._patience = LATER
