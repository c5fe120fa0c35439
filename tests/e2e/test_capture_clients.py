"""The server under the programs that administrators use: nbdinfo, nbdcopy, qemu-img, qemu-io, fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capture_tools import MIB, Capture, DiskOf, compose, first_difference, journal_entries, raw_image

SIZE = 24 * MIB


def run(*command: object) -> str:
    """Run a program that must succeed; its stdout."""
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    image = raw_image(tmp_path / "a.raw", SIZE)
    with Capture(
        tmp_path, [DiskOf("vda", image), DiskOf("vdb", raw_image(tmp_path / "b.raw", SIZE))], journal_size=96 * MIB
    ) as made:
        yield made


def check(capture: Capture) -> None:
    """History says what the images hold."""
    disks = compose(list(journal_entries(capture.journal)), dict.fromkeys(range(len(capture.disks)), bytes(SIZE)))
    for index, disk in enumerate(capture.disks):
        assert first_difference(disks[index], disk.image.read_bytes()) is None


def test_nbdinfo_lists_both_exports(capture: Capture) -> None:
    listed = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={capture.socket_path}"))
    assert {export["export-name"]: export["export-size"] for export in listed["exports"]} == {"vda": SIZE, "vdb": SIZE}
    (vda,) = (export for export in listed["exports"] if export["export-name"] == "vda")
    assert vda["can_multi_conn"] is True
    assert vda["contexts"] == ["base:allocation"]


def test_nbdinfo_maps_the_allocation(capture: Capture) -> None:
    with open(capture.disks[0].image, "r+b") as image:
        image.seek(MIB)
        image.write(b"x" * 65536)
    extents = json.loads(run("nbdinfo", "--json", "--map", capture.uri()))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, MIB, 3),
        (MIB, 65536, 0),
        (MIB + 65536, SIZE - MIB - 65536, 3),
    ]


def test_nbdcopy_there_and_back(capture: Capture, tmp_path: Path) -> None:
    source = raw_image(tmp_path / "source", SIZE)
    with open(source, "r+b") as file:
        for at in range(0, SIZE, 5 * MIB):
            file.seek(at)
            file.write(os.urandom(300_000))
    run("nbdcopy", "--flush", source, capture.uri())
    run("nbdcopy", capture.uri(), tmp_path / "back")
    assert first_difference(source.read_bytes(), (tmp_path / "back").read_bytes()) is None
    check(capture)


def test_nbdcopy_between_the_disks_of_one_capture(capture: Capture) -> None:
    capture.disks[0].image.write_bytes(os.urandom(SIZE))
    run("nbdcopy", "--connections=4", capture.uri("vda"), capture.uri("vdb"))
    assert first_difference(*(disk.image.read_bytes() for disk in capture.disks)) is None


def test_qemu_img_converts_and_compares(capture: Capture, tmp_path: Path) -> None:
    source = raw_image(tmp_path / "source", SIZE)
    with open(source, "r+b") as file:
        file.write(os.urandom(3 * MIB))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", source, capture.uri())
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, capture.uri())
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", capture.uri(), tmp_path / "copy.qcow2")
    assert "identical" in run("qemu-img", "compare", tmp_path / "copy.qcow2", capture.uri())
    check(capture)


def test_qemu_io_writes_zeroes_discards_and_reads_back(capture: Capture) -> None:
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512 512",
        "write -z 64k 64k",
        "write -z -u 256k 64k",
        "discard 512k 128k",
        "flush",
        "aio_write -P 0x33 2M 1M",
        "aio_write -P 0x44 4M 1M",
        "aio_flush",
        "read -P 0x11 0 512",
        "read -P 0x22 512 512",
        "read -P 0 64k 64k",
        "read -P 0 256k 64k",
        "read -P 0 512k 128k",
        "read -P 0x11 1020k 4k",
        "read -P 0x33 2M 1M",
        "read -P 0x44 4M 1M",
    ]
    words: list[str] = []
    for command in commands:
        words += ["-c", command]
    said = run("qemu-io", "-f", "raw", "-d", "unmap", capture.uri(), *words)
    assert "failed" not in said
    check(capture)


def test_qemu_io_out_of_range_fails_and_the_export_goes_on(capture: Capture) -> None:
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", f"write {SIZE} 512", "-c", "write -P 9 0 512", "-c", "read -P 9 0 512", capture.uri()],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "wrote 512/512 bytes at offset 0" in done.stdout
    assert "read 512/512 bytes at offset 0" in done.stdout
    assert "verification failed" not in done.stdout


@pytest.mark.parametrize(("pattern", "block", "depth"), [("randwrite", "4k", 16), ("randrw", "512-64k", 8), ("write", "256k", 4)])
def test_fio_verifies_what_it_wrote(capture: Capture, tmp_path: Path, pattern: str, block: str, depth: int) -> None:
    sizes = f"--bsrange={block}" if "-" in block else f"--bs={block}"
    report = run(
        *("fio", "--output-format=json", "--name=verify", "--ioengine=nbd", f"--uri={capture.uri()}", f"--rw={pattern}", sizes),
        *(f"--iodepth={depth}", "--size=16m", "--io_size=16m", "--verify=crc32c", "--verify_fatal=1", "--randseed=42"),
        *("--randrepeat=1", "--fsync=64", "--exitall_on_error", f"--aux-path={tmp_path}"),
    )
    job = json.loads(report[report.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 0
    assert job["read"]["total_ios"] > 0, "it read back what it wrote"
    check(capture)


def test_nbdkit_copies_to_it_like_to_any_server(capture: Capture, tmp_path: Path) -> None:
    """The reference server's own sparse test disk, through a pipe of reference tools."""
    assert shutil.which("nbdkit")
    run("nbdkit", "-U", "-", "sparse-random", f"size={SIZE}", "seed=7", "percent=30", "--run", f'nbdcopy "$uri" "{capture.uri()}"')
    run("nbdkit", "-U", "-", "sparse-random", f"size={SIZE}", "seed=7", "percent=30", "--run", f'nbdcopy "{capture.uri()}" "$uri"')
    check(capture)
