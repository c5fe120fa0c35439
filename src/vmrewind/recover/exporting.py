"""A moment's disks on a unix socket for as long as a ``with`` block lasts: what export, boot and bisect stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal.runs import Position
from vmrewind.recover.chunk_cache import ChunkCache, ServedView
from vmrewind.recover.export_server import ExportServer
from vmrewind.recover.scratch import Scratch
from vmrewind.start.children import listen


@dataclass(frozen=True, slots=True)
class Exported:
    """Disks by target, and where they are served; an export's name is the disk's target."""

    socket: Path
    disks: Mapping[str, View | Scratch]

    @property
    def uris(self) -> dict[str, str]:
        """NBD URIs by target."""
        return {target: f"nbd+unix:///{quote(target, safe='')}?socket={quote(str(self.socket))}" for target in self.disks}


@contextmanager
def exported(
    history: History,
    targets: Sequence[str],
    position: Position,
    path: Path,
    *,
    cache: ChunkCache,
    scratch: Path | None,
    complain: Callable[[str], None],
    owner: tuple[int, int] | None = None,
) -> Iterator[Exported]:
    """Serve the disks at ``path``, whose directory is there. ``scratch``: the directory for changes, None for read-only.

    ``cache``: may be other moments' too, and outlives the block. ``owner``: (uid, gid) of a QEMU that runs as another user. Threads
    begin here and end with the block.
    """
    with ExitStack() as held:
        disks: dict[str, View | Scratch] = {}
        for target in targets:
            view = ServedView.open(history, target, position)
            view.cache = cache
            disks[target] = view if scratch is None else Scratch(view, scratch)
            if isinstance(disk := disks[target], Scratch):
                held.callback(disk.close)
        held.callback(path.unlink, missing_ok=True)
        listener = held.enter_context(listen(path, owner))
        server = ExportServer(disks, listener, complain)
        server.start()
        held.callback(server.stop)
        yield Exported(path, disks)
