"""What the control socket can ask of capture: status, mark, resync."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmrewind.capture.control import Answer
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import JournalFull

if TYPE_CHECKING:
    from vmrewind.capture.server import Server

RESYNC_RANGES_MAX: Final = 1024
RESYNC_BYTES_MAX: Final = 4 << 20
"""Most that one resync instruction may ask for: the guest's requests wait meanwhile."""
_KEYS: Final = {
    "status": {"command"},
    "mark": {"command", "name", "quiesced"},
    "resync": {"command", "run", "disk", "ranges", "close"},
}


def instruct(server: Server, request: dict[str, Any], answer: Answer) -> None:
    """Carry out one instruction of the control socket and answer it."""
    command = request.get("command")
    known = _KEYS.get(command) if isinstance(command, str) else None
    if known is not None and (unknown := request.keys() - known):
        # An instruction of a newer version means something by it.
        message = f"{command} has no {', '.join(sorted(unknown))!r:.100}"
        answer({"ok": False, "kind": "usage", "message": message})
        return
    match command:
        case "status":
            answer({"ok": True, **status(server)})
        case "mark":
            _mark(server, request, answer)
        case "resync":
            _resync(server, request, answer)
        case _:
            answer({"ok": False, "kind": "usage", "message": f"capture knows no instruction {command!r:.100}"})


def status(server: Server) -> dict[str, Any]:
    """What ``vmrewind status`` asks for."""
    writer = server.writer
    return {
        "pid": os.getpid(),
        "run": fmt.run_name(writer.run),
        "seq": writer.next_seq - 1,
        "time_ns": writer.last_time_ns,
        "batch": writer.next_batch - 1,
        "batch_checkpointed": server.state.checkpoint,
        "journal_full": server.holding,
        "journal_deleted": server.pool.deleted,
        "bypass": server.bypass.status(),
        "disks": {
            target: {
                "image": disk.image.path,
                "size": disk.size,
                "format": disk.image.format,
                "clients": len(disk.connections),
            }
            for target, disk in server.disks.items()
        },
    }


def _mark(server: Server, request: dict[str, Any], answer: Answer) -> None:
    name = request.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
        message = "a bookmark's name is 1 to 200 printable characters, without white space at its ends"
        answer({"ok": False, "kind": "usage", "message": message})
        return
    if server.bypass.is_open:
        answer({"ok": False, "kind": "space", "message": "the VM's history has a gap now, which no bookmark can be set in"})
        return
    content: dict[str, Any] = {"name": name, "kind": "crash-consistent"}
    if (quiesced := request.get("quiesced")) is not None:
        if not _is_quiesced(server, quiesced):
            answer({"ok": False, "kind": "usage", "message": "the moment to be marked as quiesced is none of this run"})
            return
        content = {"name": name, "kind": "quiesced", **{key: quiesced[key] for key in ("seq", "time_ns", "not_frozen")}}
    seq = server.record_event(fmt.Event.BOOKMARK, content)
    if seq is None:
        answer({"ok": False, "kind": "space", "message": "the journal has no room for a bookmark now"})
        return
    server.durability.flush(_Marked(answer, fmt.run_name(server.writer.run), seq, server.writer.last_time_ns), 0)


def _is_quiesced(server: Server, value: Any) -> bool:
    """Whether ``value`` names a record of this run at which a guest was frozen, as ``vmrewind mark --quiesce`` has found it."""
    if not isinstance(value, dict) or value.keys() != {"run", "seq", "time_ns", "not_frozen"}:
        return False
    writer, seq, time_ns = server.writer, value["seq"], value["time_ns"]
    if value["run"] != fmt.run_name(writer.run) or type(seq) is not int or type(time_ns) is not int:
        return False
    left_out = value["not_frozen"]
    if (
        not isinstance(left_out, list)
        or not all(isinstance(path, str) and path.isprintable() for path in left_out)
        or len(str(left_out)) > 4096
    ):
        return False
    return 0 < seq < writer.next_seq and 0 <= time_ns <= writer.last_time_ns


@dataclass(frozen=True, slots=True)
class _Marked:
    """A bookmark that is to be on stable storage before it is answered."""

    answer: Answer
    run: str
    seq: int
    time_ns: int

    def flushed(self, _: int, error: int) -> None:
        if error:
            self.answer({"ok": False, "kind": "failed", "message": f"not on stable storage: {os.strerror(error)}"})
        else:
            self.answer({"ok": True, "run": self.run, "seq": self.seq, "time_ns": self.time_ns})


def _resync(server: Server, request: dict[str, Any], answer: Answer) -> None:
    """Journal ranges of a disk anew as the image holds them now, and if asked, declare its history level with its image.

    Carried out between two batches, so what is journaled is what the image holds at that place in the order of writes.
    """
    disk = server.disks.get(str(request.get("disk")))
    ranges = request.get("ranges", [])
    if request.get("run") != fmt.run_name(server.writer.run):
        # A resync that outlived its run compares with the wrong history: it must not close a gap of this one.
        answer({"ok": False, "kind": "usage", "message": "this capture serves another run"})
        return
    if server.bypass.is_open:
        # What closes this gap would be taken for the end of that one.
        answer({"ok": False, "kind": "vm-state", "message": "a resync has to wait until the gap that is open is closed"})
        return
    if disk is None or not _are_ranges(ranges, disk.size) or not isinstance(request.get("close", False), bool):
        answer({"ok": False, "kind": "usage", "message": "resync takes a disk and ranges within it"})
        return
    try:
        if server.arrears.refused and not server.arrears.settle():
            raise JournalFull("it has no room for what an image has refused")
        for offset, length in ranges:
            if not server.arrears.journal_as_is(disk, offset, length):
                answer({"ok": False, "kind": "image", "message": f"{disk.image.path}: cannot be read at {offset}"})
                return
        if request.get("close"):
            server.writer.event(fmt.Event.GAP_END, {"resynced": disk.target}, disk.index)
    except JournalFull as full:
        answer({"ok": False, "kind": "space", "message": f"the journal has no room: {full}"})
        return
    server.state.set_applied(server.writer.next_batch - 1)
    answer({"ok": True, "seq": server.writer.next_seq - 1})


def _are_ranges(value: Any, size: int) -> bool:
    """Whether ``value`` is a list of [offset, length] within a disk of ``size`` bytes, not more than a loop's turn should take."""
    if not isinstance(value, list) or len(value) > RESYNC_RANGES_MAX:
        return False
    total = 0
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)):
            return False
        offset, length = pair
        if offset < 0 or length <= 0 or offset + length > size:
            return False
        total += length
    return total <= RESYNC_BYTES_MAX
