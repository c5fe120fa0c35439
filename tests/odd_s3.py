"""An S3 server on loopback that answers as it is told: what real stores do once in a thousand times.

It takes the two requests of Google's XML interface too that differ in a header only.
"""

from __future__ import annotations

import http.server
import threading
import urllib.parse
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

Answer = Callable[["OddS3", "_Request"], bool]
"""Does one request oddly, and says so by True; False leaves it to be done well."""


class OddS3:
    """``oddities`` are asked in turn about every request; ``objects`` is what is there, by path."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.oddities: list[Answer] = []
        self.released = threading.Event()
        """Set: requests that hang end."""
        handler = type("Handler", (_Request,), {"store": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Request(http.server.BaseHTTPRequestHandler):
    store: OddS3
    protocol_version = "HTTP/1.1"

    def do(self) -> None:
        self.path_only, _, self.query = self.path.partition("?")
        self.path_only = urllib.parse.unquote(self.path_only)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.store.requests.append(f"{self.command} {self.path_only}")
        if not any(oddity(self.store, self) for oddity in list(self.store.oddities)):
            self.well()

    do_GET = do_PUT = do_HEAD = do_DELETE = do  # noqa: N815 - the names that the base class calls

    def well(self) -> None:
        objects = self.store.objects
        if self.command == "PUT":
            conditional = self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
            if self.path_only in objects and conditional:
                return self.answer(412, code="PreconditionFailed")
            objects[self.path_only] = self.body
            return self.answer(200)
        if self.path_only not in objects:
            return self.answer(404, code="NoSuchKey")
        return self.answer(200, objects[self.path_only])

    def answer(self, status: int, body: bytes = b"", code: str = "", message: str = "words of the store") -> None:
        if code:
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "ETag": '"e"', "Last-Modified": "Sun, 22 Nov 2026 10:31:05 GMT"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def hangs(store: OddS3, _: _Request) -> bool:
    """Never answers."""
    store.released.wait()
    return True


def answers(status: int, code: str, *, method: str = "", times: int = 1 << 30, lands: bool = False) -> Answer:
    """Answers with an error, so many times; ``lands``: although it does what it is asked."""
    left = [times]

    def answer(store: OddS3, request: _Request) -> bool:
        if left[0] == 0 or (method and request.command != method):
            return False
        left[0] -= 1
        if lands:
            store.objects[request.path_only] = request.body
        request.answer(status, code=code)
        return True

    return answer
