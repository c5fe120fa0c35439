"""Nothing that a VM writes is missed: not by its boot loader, not by its kernel, and an independent witness agrees."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from guests.grub import ENV_LINE, GUEST_BLOCKS, GUEST_PATTERN, grub_disk
from guests.images import ext4_image
from guests.kernel import linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import append, writer_initramfs
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, records, segment_files

SECTOR = 512


@dataclass(frozen=True)
class Written:
    """A record of the journal with its payload."""

    seq: int
    time_ns: int
    op: int
    offset: int
    length: int
    data: bytes


def everything_written(journal: Path) -> list[Written]:
    """Every record of a journal directory, in order, each payload verified."""
    found = []
    for file in segment_files(journal):
        with Segment(file.path) as segment:
            for batch in segment.batches():
                for r in records(batch):
                    data = segment.payload(r) if r.has_payload else b""
                    found.append(Written(r.seq, r.time_ns, r.op, r.offset, r.length, data))
    return found


def test_the_boot_loaders_write_is_in_the_journal_before_the_kernels_first(tmp_path: Path) -> None:
    disk = grub_disk(tmp_path / "boot.raw")
    before = disk.path.read_bytes()
    command = qemu_command(tmp_path / "serial")
    vm = ProtectedVm(tmp_path, "grub", command, [Disk("vda", disk.path, device="virtio-blk-pci,bootindex=1")])
    vmrewind("init", vm.repository)
    with vm:
        vm.start()
        assert vm.wait(120) == 0
    assert "GUEST WROTE" in vm.console.text()

    writes = [w for w in everything_written(vm.journal) if w.op == fmt.Op.WRITE]
    loader = next(w for w in writes if ENV_LINE in w.data)
    assert loader.offset <= disk.grubenv_offset < loader.offset + loader.length
    kernel = next(w for w in writes if w.offset >= disk.data_offset)
    assert loader.time_ns < kernel.time_ns and loader.seq < kernel.seq
    assert loader.seq == min(w.seq for w in writes), "something was written before the boot loader's write"
    assert b"".join(w.data for w in writes if w.offset >= disk.data_offset)[: 4096 * GUEST_BLOCKS] == GUEST_PATTERN * GUEST_BLOCKS

    names = [event["event"] for event in vm.events()]
    order = ["start.begin", "capture.created", "config.parsed", "disks.assigned", "ship.created", "qemu.started", "cpu.started"]
    assert [name for name in names if name in order] == order
    cpu_started_ns = next(e["time_ns"] for e in vm.events() if e["event"] == "cpu.started")
    assigned_ns = next(e["time_ns"] for e in vm.events() if e["event"] == "disks.assigned")
    assert assigned_ns < loader.time_ns and assigned_ns < cpu_started_ns

    # The state right before that write is the disk as it was never booted; right after it, the boot loader alone has written.
    vmrewind("restore", vm.config, "--at", f"seq:{loader.seq - 1}", "--output", tmp_path / "unbooted")
    assert (tmp_path / "unbooted" / "vda.raw").read_bytes() == before
    vmrewind("restore", vm.config, "--at", f"seq:{loader.seq}", "--output", tmp_path / "loaded")
    loaded = (tmp_path / "loaded" / "vda.raw").read_bytes()
    assert loaded != before and loaded[loader.offset : loader.offset + loader.length] == loader.data


class Witness:
    """QEMU's blklogwrites file: ``entries`` of (kind, offset, length, data)."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        magic, version, count, sector_size = struct.unpack_from("<QQQI", raw)
        assert (magic, version) == (0x6A736677736872, 1)
        self.entries: list[tuple[str, int, int, bytes]] = []
        at = sector_size
        for _ in range(count):
            sector, sectors, flags, _ = struct.unpack_from("<QQQQ", raw, at)
            at += sector_size
            length = sectors * sector_size
            if flags & 4:
                self.entries.append(("discard", sector * sector_size, length, b""))
            elif sectors:
                self.entries.append(("write", sector * sector_size, length, raw[at : at + length]))
                at += length
            if flags & 1:
                self.entries.append(("flush", 0, 0, b""))


def per_sector(entries: list[tuple[str, int, int, bytes]]) -> dict[int, list[bytes]]:
    """What was written to each sector, in order; a discard counts as b""."""
    found: dict[int, list[bytes]] = defaultdict(list)
    for kind, offset, length, data in entries:
        for at in range(0, length, SECTOR):
            found[(offset + at) // SECTOR].append(data[at : at + SECTOR] if kind == "write" else b"")
    return found


def test_an_independent_witness_saw_just_what_the_journal_holds(tmp_path: Path) -> None:
    image = ext4_image(tmp_path / "vda.raw", 96 << 20)
    witness = tmp_path / "witness.log"
    witness.touch()
    guest = linux()
    command = qemu_command(tmp_path / "serial", guest.kernel, writer_initramfs(), append(count=60, kib=24))
    command += ["-blockdev", f"driver=blklogwrites,node-name=logged,file=vda,log.driver=file,log.filename={witness}"]
    command += ["-device", "virtio-blk-pci,drive=logged"]
    vm = ProtectedVm(tmp_path, "witness", command, [Disk("vda", image, device="none")])
    vmrewind("init", vm.repository)
    with vm:
        vm.start()
        assert vm.wait() == 0
    assert "DONE 60" in vm.console.text()

    seen = [entry for entry in Witness(witness).entries if entry[0] != "flush"]
    kinds = {fmt.Op.WRITE: "write", fmt.Op.ZERO: "write", fmt.Op.DISCARD: "discard"}
    held = [
        (kinds[fmt.Op(w.op)], w.offset, w.length, w.data if w.op == fmt.Op.WRITE else bytes(w.length))
        for w in everything_written(vm.journal)
        if w.op in kinds
    ]
    assert len(seen) > 100
    assert Counter((kind, offset, length) for kind, offset, length, _ in held) == Counter(
        (kind, offset, length) for kind, offset, length, _ in seen
    )
    assert per_sector([(k, o, n, d if k == "write" else b"") for k, o, n, d in held]) == per_sector(seen)
