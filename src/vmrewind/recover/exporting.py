"""A moment's disks on a unix socket for as long as a ``with`` block lasts: what export, boot and bisect stand on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal.runs import Position
from vmrewind.recover.chunk_cache import ChunkCache, ServedView
from vmrewind.recover.export_server import ExportServer
from vmrewind.recover.scratch import Overlay
from vmrewind.start.listening import listen


class Exported:
    """Disks by target, and where they are served; an export's name is the disk's target."""

    def __init__(self, path: Path, disks: Mapping[str, View | Overlay], listener: socket.socket, server: ExportServer) -> None:
        self.socket = path
        self.disks = disks
        self._listener = listener
        self._server = server
        self._handed_over = False

    @property
    def uris(self) -> dict[str, str]:
        """NBD URIs by target."""
        return {target: f"nbd+unix:///{quote(target, safe='')}?socket={quote(str(self.socket))}" for target in self.disks}

    def hand_over(self, successor: Path) -> None:
        """Have who listens at ``successor``, a socket on the same file system, serve whoever connects here from now on.

        Clients are hung up on once all that they asked for is done, and none gets to the successor before: so what a client sends
        again, because it was not answered, cannot be done a second time behind what the client sends afterwards. The path stays.
        """
        beside = self.socket.with_suffix(".next")
        beside.unlink(missing_ok=True)
        os.link(successor, beside)
        self._server.stop()
        beside.replace(self.socket)
        self._handed_over = True
        # Those who have connected meanwhile try again, and find the other one.
        self._listener.close()

    def close(self) -> None:
        """Hang up on everybody."""
        self._server.stop()
        if not self._handed_over:
            self.socket.unlink(missing_ok=True)


@contextmanager
def exported(
    history: History,
    targets: Sequence[str],
    position: Position,
    path: Path,
    *,
    cache: ChunkCache,
    changes: Callable[[str, View], Overlay] | None,
    complain: Callable[[str], None],
    owner: tuple[int, int] | None = None,
) -> Iterator[Exported]:
    """Serve the disks at ``path``, whose directory is there. ``changes``: makes of a disk and its view what takes
    changes; None for read-only.

    ``cache``: may be other moments' too, and outlives the block. ``owner``: (uid, gid) of a QEMU that runs as another user. Threads
    begin here and end with the block.
    """
    with ExitStack() as held:
        disks: dict[str, View | Overlay] = {}
        for target in targets:
            view = ServedView.open(history, target, position)
            view.cache = cache
            disks[target] = view if changes is None else changes(target, view)
            if isinstance(disk := disks[target], Overlay):
                held.callback(disk.close)
        listener = held.enter_context(listen(path, owner))
        server = ExportServer(disks, listener, complain)
        serving = Exported(path, disks, listener, server)
        held.callback(serving.close)
        server.start()
        yield serving
