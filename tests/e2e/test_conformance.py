"""Reference clients at their odder ends. After each, what history says is what the image holds.

The everyday uses of these programs are in test_capture_clients.py.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd as libnbd
import pytest

from tests.capture_tools import MIB, Capture, DiskOf, compose, first_difference, journal_entries, raw_image, until
from tests.e2e.test_capture_clients import run

SIZE = 16 * MIB


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    """One disk, vda; at the end its history must be its image."""
    disk = DiskOf("vda", raw_image(tmp_path / "a.raw", SIZE))
    with Capture(tmp_path, [disk], journal_size=160 * MIB) as made:
        yield made
        entries = list(journal_entries(made.journal))
        assert first_difference(compose(entries, {0: bytes(SIZE)})[0], disk.image.read_bytes()) is None


def patched(path: Path) -> Path:
    """A sparse file with data here and there, some of it at odd places."""
    raw_image(path, SIZE)
    with open(path, "r+b") as file:
        for at in (0, 3 * MIB + 511, 7 * MIB, SIZE - 70_000):
            file.seek(at)
            file.write(os.urandom(70_000))
    return path


@pytest.mark.parametrize(
    ("options", "verified"),
    [
        (("--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=16"), True),
        (("--rw=randrw", "--bsrange=4k-256k", "--iodepth=8", "--fsync=7"), True),
        (("--rw=randtrimwrite", "--bs=8k", "--iodepth=4", "--numjobs=1"), False),
    ],
    ids=["unaligned", "mixed", "trimwrite"],
)
def test_fio_with_mixed_sizes(capture: Capture, tmp_path: Path, options: tuple[str, ...], verified: bool) -> None:
    verify = ("--verify=crc32c", "--verify_fatal=1") if verified else ()
    report = run(
        *("fio", "--output-format=json", "--name=x", "--ioengine=nbd", f"--uri={capture.uri()}", f"--size={SIZE}", "--randseed=7"),
        *("--exitall_on_error", f"--aux-path={tmp_path}", *verify, *options),
    )
    job = json.loads(report[report.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 20
    assert not verified or job["read"]["total_ios"] > 20, "it read back what it wrote"


@pytest.mark.parametrize(
    "options",
    [
        ("--destination-is-zero",),
        ("--flush", "--synchronous"),
        ("--allocated", "--request-size=8388608"),
        ("--connections=4", "--requests=32"),
    ],
    ids=lambda options: options[0],
)
def test_nbdcopy_in_and_out(capture: Capture, tmp_path: Path, options: tuple[str, ...]) -> None:
    source = patched(tmp_path / "source")
    run("nbdcopy", *options, source, capture.uri())
    assert first_difference(source.read_bytes(), capture.disks[0].image.read_bytes()) is None
    run("nbdcopy", *(option for option in options if option != "--destination-is-zero"), capture.uri(), tmp_path / "back")
    assert first_difference(source.read_bytes(), (tmp_path / "back").read_bytes()) is None


def test_qemu_img_maps_benches_and_measures(capture: Capture, tmp_path: Path) -> None:
    source = patched(tmp_path / "source")
    run("qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw", "-m", "8", source, capture.uri())
    run("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", source, capture.uri())
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", capture.uri()))
    assert sum(extent["length"] for extent in extents) == SIZE
    content = source.read_bytes()
    for extent in extents:
        if extent["zero"]:
            assert not any(content[extent["start"] :][: extent["length"]])
    assert any(extent["zero"] for extent in extents)
    said = run("qemu-img", "bench", "-w", "-f", "raw", "-c", "3000", "-d", "16", "-s", "4096", "--flush-interval=64", capture.uri())
    assert "Run completed" in said
    assert "Run completed" in run("qemu-img", "bench", "-f", "raw", "-c", "3000", "-d", "16", "-s", "65536", capture.uri())


def test_nbdkit_between_client_and_capture(capture: Capture, tmp_path: Path) -> None:
    """nbdkit's own client, whose server then serves nbdcopy."""
    source = patched(tmp_path / "source")
    proxy = ("nbdkit", "-U", "-", "nbd", capture.uri(), "--run")
    run(*proxy, f'nbdcopy --flush {source} "$uri" && nbdcopy "$uri" {tmp_path / "back"} && nbdinfo --map "$uri"')
    assert first_difference(source.read_bytes(), (tmp_path / "back").read_bytes()) is None


# -- libnbd, call by call


@pytest.mark.parametrize("structured", [True, False])
def test_every_call_of_libnbd(capture: Capture, structured: bool) -> None:
    handle = libnbd.NBD()
    handle.set_request_structured_replies(structured)
    if structured:
        handle.add_meta_context("base:allocation")
    handle.connect_uri(capture.uri())
    # What libnbd itself would refuse is sent all the same: the server's word counts.
    handle.set_strict_mode(0)
    assert handle.get_structured_replies_negotiated() is structured
    assert handle.can_df() is structured
    assert handle.can_meta_context("base:allocation") is structured
    assert handle.get_protocol() == "newstyle-fixed"
    assert not handle.is_read_only()
    assert not handle.is_rotational()

    data = bytes(range(256)) * 20
    handle.pwrite(data, 12345, libnbd.CMD_FLAG_FUA)
    assert handle.pread(len(data), 12345) == data
    assert handle.pread(3 * MIB, 0)[12345 : 12345 + len(data)] == data
    if structured:
        pieces: list[tuple[int, int, int]] = []
        handle.pread_structured(
            3 * MIB, 0, lambda part, offset, status, _: pieces.append((offset, len(part), status)), libnbd.CMD_FLAG_DF
        )
        assert pieces == [(0, 3 * MIB, libnbd.READ_DATA)], "not a fragment"
    handle.trim(5000, 12345, libnbd.CMD_FLAG_FUA)
    assert not any(handle.pread(5000, 12345))
    for flags in (0, libnbd.CMD_FLAG_FUA, libnbd.CMD_FLAG_NO_HOLE, libnbd.CMD_FLAG_FAST_ZERO):
        handle.pwrite(b"\xff" * 8192, 65536)
        handle.zero(8000, 65536, flags)
        assert handle.pread(8192, 65536) == bytes(8000) + b"\xff" * 192
    handle.cache(MIB, 0)
    handle.flush()
    for call, expected in (
        (lambda: handle.pread(512, SIZE), errno.EINVAL),
        (lambda: handle.pwrite(b"x", SIZE), errno.ENOSPC),
        (lambda: handle.zero(512, SIZE), errno.ENOSPC),
        (lambda: handle.trim(512, SIZE), errno.EINVAL),
        (lambda: handle.cache(512, SIZE), errno.EINVAL),
        (lambda: handle.pwrite(b"x", 0, libnbd.CMD_FLAG_REQ_ONE), errno.EINVAL),
        (
            lambda: handle.block_status(4096, 0, lambda *_: 0) if not structured else handle.block_status(1, SIZE, lambda *_: 0),
            errno.EINVAL,
        ),
    ):
        with pytest.raises(libnbd.Error) as caught:
            call()
        assert caught.value.errnum == expected
    assert handle.pread(8192, 65536) == bytes(8000) + b"\xff" * 192, "and it goes on"
    handle.shutdown()


def test_option_mode_of_libnbd(capture: Capture) -> None:
    """List, information on exports that are there and are not, then go, all on one connection."""
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.add_meta_context("base:allocation")
    handle.connect_unix(str(capture.socket_path))
    names: list[str] = []
    assert handle.opt_list(lambda name, _: names.append(name) or 0) == 1
    assert names == ["vda"]
    contexts: list[str] = []
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    assert contexts == ["base:allocation"]
    handle.set_export_name("nowhere")
    for refused in (handle.opt_info, handle.opt_go):
        with pytest.raises(libnbd.Error):
            refused()
    handle.set_export_name("vda")
    handle.opt_info()
    assert handle.get_size() == SIZE
    handle.opt_go()
    handle.pwrite(b"begun", 0)
    handle.shutdown()
    handle = libnbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_unix(str(capture.socket_path))
    handle.opt_abort()


# -- QEMU's mirror job


class Daemon:
    """A qemu-storage-daemon and its monitor."""

    def __init__(self, directory: Path) -> None:
        # Its monitor is a pipe: of a socket nobody knows when it may be connected to.
        self._process = subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", "stdio,id=m,signal=off", "--monitor", "chardev=m"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "both were asked for"
        self._asks, self._lines = self._process.stdin, self._process.stdout
        assert "QMP" in json.loads(self._lines.readline())
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: Any) -> Any:
        """One command's return value; events on the way are skipped."""
        self._asks.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._asks.flush()
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "error" not in answer, answer
        return answer["return"]

    def mirror(self, source: dict[str, Any], target: dict[str, Any]) -> None:
        """Copy one to the other with a mirror job, wait until it has caught up, and end it."""
        for name, node in (("source", source), ("target", target)):
            self.do("blockdev-add", **{"node-name": name, **node})
        self.do("blockdev-mirror", **{"job-id": "mirror", "device": "source", "target": "target", "sync": "full"})
        until(lambda: self.do("query-jobs")[0]["status"] == "ready", "the mirror to catch up")
        self.do("job-complete", id="mirror")
        until(lambda: not self.do("query-jobs"), "the mirror's end")

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)


@pytest.mark.parametrize("inwards", [True, False])
def test_qemu_mirrors(capture: Capture, tmp_path: Path, inwards: bool) -> None:
    other = patched(tmp_path / "other")
    export = {"driver": "nbd", "export": "vda", "server": {"type": "unix", "path": str(capture.socket_path)}}
    file = {"driver": "file", "filename": str(other)}
    if not inwards:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", other, capture.uri())
        raw_image(other, SIZE)
    daemon = Daemon(tmp_path)
    try:
        daemon.mirror(*((file, export) if inwards else (export, file)))
    finally:
        daemon.close()
    assert any(capture.disks[0].image.read_bytes()[:70_000])
    assert first_difference(other.read_bytes(), capture.disks[0].image.read_bytes()) is None
