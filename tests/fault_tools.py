"""What fault tests share: a capture whose journal's storage fails for as long as a test wants that, a living process whose system
calls fail, small file systems."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.capture_tools import Capture, until
from vmrewind.start.processes import Process

# The calls by which a journal is written, each failing where the file lies in the directory that the first argument names, while
# the file of the second argument holds an errno. For ENOSPC what is only synced does not fail.
_FAULTY = """
import errno, mmap, os, runpy, sys
directory, switch = sys.argv.pop(1), sys.argv.pop(1)
def number():
    try:
        return int(open(switch).read() or 0)
    except FileNotFoundError:
        return 0
def check(fd, syncs=False):
    failing = number()
    if failing and not (syncs and failing == errno.ENOSPC) and os.readlink(f"/proc/self/fd/{fd}").startswith(directory):
        raise OSError(failing, os.strerror(failing))
def faulty(name, syncs):
    call = getattr(os, name)
    def wrapper(fd, *rest):
        check(fd, syncs)
        return call(fd, *rest)
    setattr(os, name, wrapper)
for name, syncs in (("pwritev", False), ("pwrite", False), ("posix_fallocate", False), ("fdatasync", True), ("fsync", True)):
    faulty(name, syncs)
class Map(mmap.mmap):
    def __new__(cls, fd, *rest):
        made = super().__new__(cls, fd, *rest)
        made.journal = os.readlink(f"/proc/self/fd/{fd}").startswith(directory)
        return made
    def flush(self, *rest):
        failing = number()
        if failing and failing != errno.ENOSPC and self.journal:
            raise OSError(failing, os.strerror(failing))
        return super().flush(*rest)
mmap.mmap = Map
runpy.run_module("vmrewind.capture", run_name="__main__", alter_sys=True)
"""


class FaultyCapture(Capture):
    """``fail`` makes the journal's storage fail, ``heal`` makes it work again."""

    def _program(self) -> list[str]:
        return ["-c", _FAULTY, str(self.journal), str(self._switch)]

    @property
    def _switch(self) -> Path:
        return self.events_path.with_name("errno")

    def fail(self, number: int = errno.EIO) -> None:
        temporary = self._switch.with_suffix(".tmp")
        temporary.write_text(str(number))
        temporary.replace(self._switch)

    def heal(self) -> None:
        self._switch.unlink(missing_ok=True)


@contextmanager
def ext4(directory: Path, mebibytes: int) -> Iterator[Path]:
    """A small file system of its own, mounted from a loop device at ``directory``/mounted; needs root."""
    image, mounted = directory / "ext4.img", directory / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def make_read_only(mounted: Path) -> None:
    """What ext4 does of its own accord after an error, with files open for writing."""
    subprocess.run(["mount", "-o", "remount,abort", mounted], check=True)


def on_disk(directory: Path, path: str) -> bytes:
    """A file's content after a crash of the file system ``ext4(directory)`` now: what the kernel only has in memory is lost."""
    crashed = directory / "crashed.img"
    shutil.copyfile(directory / "ext4.img", crashed)
    subprocess.run(["e2fsck", "-fy", crashed], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = ["debugfs", "-R", f"cat {path}", crashed]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def is_root() -> bool:
    return os.geteuid() == 0


@contextmanager
def failing(pid: int, calls: Sequence[str], error: str = "EIO", *, path: Path | None = None, when: str = "1+") -> Iterator[None]:
    """While this lasts, ``calls`` of a process (on ``path`` only, if given) fail without being carried out.

    ``when`` is strace's: which of them, counted per thread.
    """
    names = ",".join(calls)
    only = ["-P", str(path)] if path is not None else []
    with tempfile.TemporaryFile("w+") as said:
        strace = subprocess.Popen(
            ["strace", "-f", "-o", "/dev/null", "-p", str(pid), *only, "-e", f"inject={names}:error={error}:when={when}"],
            stderr=said,
            text=True,
        )

        def attached() -> bool:
            said.seek(0)
            text = said.read()
            assert strace.poll() is None, text
            return "attached" in text

        try:
            until(attached, "strace to attach")
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            try:
                strace.wait(3)
            except subprocess.TimeoutExpired:
                # Told to let go of a process that just ends, it may wait for it for ever; without it the end goes on.
                strace.kill()
                strace.wait()


def kill(*pids: int) -> None:
    """SIGKILL, and wait for their end. Some end by themselves once another one has."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not any(Process.of(pid) for pid in pids), "the end of what was killed")


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


@contextmanager
def no_descriptors_left(but: int = 0) -> Iterator[None]:
    """This process can open no file more, or just so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(but + 1)]
    for fd in free:
        os.close(fd)
    # Those in use may have higher numbers; the lowest free one is taken next.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
