"""The host loses its power, for real as far as the software can tell: its own kernel, file system and page cache, and a lossy disk.

Unlike in ``test_power_loss.py`` nothing stands between capture and the kernel. A Linux runs capture on an ext4 while its disk
logs every write and flush; the power is cut at points of that log, ext4 replays its journal, and recovery does its work.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import xxhash

import vmrewind
from guests.images import ext4_files, tool
from guests.initramfs import initramfs, shared_libraries
from guests.kernel import linux
from guests.machine import Machine, qemu_command
from tests.capture_tools import RUN, compose, journal_entries
from tests.power.host import (
    DISK_BYTES,
    FILE_SYSTEM_BYTES,
    TARGETS,
    Logged,
    LossyDisk,
    at_cut,
    image_content,
    read_log,
)
from vmrewind.capture.recovery import recover
from vmrewind.journal.runs import read_run, run_path, write_durably
from vmrewind.journal.verify import verify

SEED = 11
ROUNDS = 160
CUTS = 36

# Dirty pages are written back all the time and in the kernel's own order, not only when capture asks for it.
SCRIPT = """\
echo 20 >/proc/sys/vm/dirty_writeback_centisecs
echo 100 >/proc/sys/vm/dirty_expire_centisecs
mkdir /mnt/tree
mount -t ext4 -o ro /dev/vdb /mnt/tree || exit 1
mount -t ext4 -o data=ordered,commit=1 /dev/vda /mnt/tree/disk || exit 1
for shared in dev proc tmp; do mount -o bind /$shared /mnt/tree/$shared; done
export VMREWIND_RUNTIME_DIR=/tmp/run PYTHONPATH=/code
set -- $(cat /proc/cmdline | tr ' ' '\\n' | grep ^work= | tr = ' ')
chroot /mnt/tree {python} -m tests.power.host $2 $3 || {{ echo "ERR work"; cat /tmp/stderr; exit 1; }}
"""


def _python() -> Path:
    """The interpreter itself, without the virtual environment around it."""
    return Path(sys._base_executable).resolve()  # type: ignore[attr-defined]


def _file_system(path: Path, content: Path, size: int) -> Path:
    options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    subprocess.run([tool("mke2fs"), *options, "-d", content, path, f"{size >> 10}k"], check=True)
    return path


def _tree(tree: Path) -> Path:
    """A directory with all that a Python program needs: the interpreter, its libraries, its modules, the code under test."""
    for name in ("dev", "proc", "tmp", "disk"):
        (tree / name).mkdir(parents=True)
    standard = Path(sysconfig.get_path("stdlib"))
    unneeded = shutil.ignore_patterns(
        "test", "tests", "config-*", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"
    )
    shutil.copytree(standard, tree / standard.relative_to("/"), ignore=unneeded)
    code = tree / "code"
    shutil.copytree(Path(vmrewind.__file__).parent, code / "vmrewind", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(xxhash.__file__).parent, code / "xxhash", ignore=shutil.ignore_patterns("__pycache__"))
    tests = Path(__file__).parents[1]
    (code / "tests/power").mkdir(parents=True)
    for name in ("capture_tools.py", "power/__init__.py", "power/guest.py", "power/host.py"):
        shutil.copy(tests / name, code / "tests" / name)
    compileall.compile_dir(code, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    shutil.copytree(
        _python().parent, tree / _python().parent.relative_to("/"), ignore=lambda _, names: set(names) - {_python().name}
    )
    binaries = [_python(), *standard.glob("lib-dynload/*.so"), *(code / "xxhash").glob("*.so")]
    for file in (_python(), *shared_libraries(binaries)):
        (tree / file.parent.relative_to("/")).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tree / file.relative_to("/"))
    return tree


def _run_host(directory: Path) -> tuple[bytes, list[Logged]]:
    """A host's life: what its disk was in the beginning, and what the disk was then asked to do."""
    tree = _file_system(directory / "tree.ext4", _tree(directory / "tree"), 192 << 20)
    shutil.rmtree(directory / "tree")
    (directory / "images").mkdir()
    for target in TARGETS:
        (directory / "images" / f"{target}.raw").write_bytes(image_content(SEED, target))
    disk = _file_system(directory / "disk", directory / "images", FILE_SYSTEM_BYTES)
    os.truncate(disk, DISK_BYTES)
    before = disk.read_bytes()
    log = directory / "log"
    log.touch()
    command = qemu_command(
        directory / "serial", linux().kernel, initramfs(SCRIPT.format(python=_python())), f"work={SEED}={ROUNDS}", memory_mib=320
    )
    logging = f"driver=blklogwrites,node-name=disk,file.driver=file,file.filename={disk},log.driver=file,log.filename={log}"
    command += ["-blockdev", f"{logging},log-sector-size=512"]
    command += ["-device", "virtio-blk-pci,drive=disk,discard=off,write-zeroes=off"]
    command += ["-blockdev", f"driver=file,node-name=tree,filename={tree},read-only=on", "-device", "virtio-blk-pci,drive=tree"]
    with Machine(command, directory / "serial") as machine:
        machine.wait_for("^(WORK DONE|.*ERR|SCRIPT ENDED)", 180)
        assert machine.console.text().count("WORK DONE") == 1, machine.console.text()[-3000:]
    return before, list(read_log(log))


def _files_after_cut(directory: Path, content: bytearray) -> Path:
    """The file system's files once it was mounted again, so to say."""
    directory.mkdir()
    disk = directory / "disk"
    disk.write_bytes(content)
    # As at a boot: the journal is replayed, files without a name go; anything worse is an error.
    checked = subprocess.run([tool("e2fsck"), "-fp", disk], capture_output=True, text=True, check=False)
    assert checked.returncode in (0, 1), checked.stdout + checked.stderr
    files = ext4_files(disk, directory / "files")
    disk.unlink()
    return files


def _check_cut(files: Path, rounds: int) -> int:
    """Recover, as the next start does, and hold it against what the guest knows; returns how many records were replayed."""
    journal = files / "journal"
    info = read_run(journal, RUN)
    here = replace(info, disks=tuple(replace(disk, image=str(files / f"{disk.target}.raw")) for disk in info.disks))
    write_durably(run_path(journal, RUN), here.to_json())
    # The files come from a host that died, and has booted since.
    with patch("vmrewind.capture.since._boot_time_ns", time.time_ns):
        recovered = recover(journal)
    disks = at_cut(SEED, rounds)
    views: dict[int, bytearray] = {}
    if recovered is not None:
        assert recovered.host_died
        assert not recovered.changed
        entries = list(journal_entries(journal))
        assert (entries[0].record.seq, entries[-1].record.seq) == (1, recovered.position.seq)
        assert [problem for report in verify([journal]) for problem in report.problems] == []
        views = compose(entries, {i: disk.content for i, disk in enumerate(disks)})
    for i, disk in enumerate(disks):
        view = bytes(views[i]) if i in views else None
        disk.check((files / f"{disk.target}.raw").read_bytes(), view)
    return recovered.records_applied if recovered is not None else 0


def test_power_cuts_of_a_whole_host(tmp_path: Path) -> None:
    before, log = _run_host(tmp_path)
    marks = [i for i, operation in enumerate(log) if operation.mark is not None]
    assert [log[i].mark for i in marks] == list(range(ROUNDS + 1))
    rng = random.Random(SEED)
    # Half of them right behind a mark, when what was just answered has had the least time to reach the disk by itself.
    ends = [i + 1 for i in rng.sample(marks, CUTS // 2)]
    ends += rng.sample(range(marks[0] + 1, len(log)), CUTS - len(ends))
    disk = LossyDisk(before, log)
    lost = replayed = 0
    for end in sorted(ends):
        rounds = max(mark for operation in log[:end] if (mark := operation.mark) is not None)
        content, lost_here = disk.cut(end, rng)
        where = tmp_path / f"cut-{end}"
        try:
            records = _check_cut(_files_after_cut(where, content), rounds)
        except Exception as error:
            error.add_note(f"the power was cut after operation {end} of {len(log)}, with {rounds} rounds answered")
            raise
        shutil.rmtree(where)
        lost += lost_here > 0
        replayed += records > 0
    # Not one of the kinds may have come to nothing.
    assert min(lost, replayed) > CUTS // 4
