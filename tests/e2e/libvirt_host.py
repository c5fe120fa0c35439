"""A libvirt of a test's own: libvirtd with its own /etc/libvirt, /var/lib/libvirt and /run in a mount namespace.

It shares nothing with the host's libvirt or with another test's, so tests run side by side and leave nothing behind. What
is to see this libvirt (virsh, vmrewind) is run with :meth:`LibvirtHost.run`, inside the namespace.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from guests.kernel import cache_directory
from tests.warm import commands
from vmrewind.paths import VmPaths
from vmrewind.start.processes import Keeping

START_TIMEOUT_SECONDS = 60
RUN_TIMEOUT_SECONDS = 60

# QEMU leaves its parent, and libvirt waits until whoever got it has noticed its end. An init that looks only every other second
# would make each end of a VM as slow, so the daemon runs below a parent of this kind, which is told its process id.
_PARENT = """\
import ctypes, os, subprocess, sys
SET_PDEATHSIG, SET_CHILD_SUBREAPER, SIGKILL = 1, 36, 9
ctypes.CDLL(None).prctl(SET_PDEATHSIG, SIGKILL)
ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
print(subprocess.Popen(sys.argv[1:], stdout=2).pid, flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""

_ENTER = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /run
for directory in /etc/libvirt /var/lib/libvirt /var/log/libvirt; do
    mkdir -p "$directory" "$1$directory"
    cp -a "$directory/." "$1$directory"
    rm -rf "$1$directory/qemu/"*
    mount --bind "$1$directory" "$directory"
done
rm -rf /etc/libvirt/hooks
mkdir -p /etc/libvirt/hooks
# what libvirt found out about this QEMU, in seconds: kept from one test to the next
mkdir -p "$2" /var/cache/libvirt
mount --bind "$2" /var/cache/libvirt
# KVM out of sight: a device that is there but not usable makes libvirt examine QEMU anew at every call
if [ -e /dev/kvm ]; then
    touch "$1/kvm"
    chmod 000 "$1/kvm"
    mount --bind "$1/kvm" /dev/kvm
fi
# console output straight to a file, so that no virtlogd is needed; no /dev of QEMU's own, which the mount above forbids
printf '\\nstdio_handler = "file"\\nnamespaces = []\\n' >>/etc/libvirt/qemu.conf
exec libvirtd
"""


class LibvirtHost:
    """A running libvirtd. ``directory`` is open to QEMU's user: images that QEMU opens by itself belong there."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="vml-"))
        self.directory.chmod(0o711)
        # the hook's script carries these to processes that QEMU's user must reach
        Path(os.environ["VMREWIND_RUNTIME_DIR"]).chmod(0o711)
        self.log = self.directory / "libvirtd.log"
        self._namespace = -1
        self._again: subprocess.Popen[bytes] | None = None
        private = self.directory / "private"
        private.mkdir()
        cache = cache_directory() / "libvirt"
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--", "sh", "-c"]
        with self.log.open("wb") as log:
            self._parent = subprocess.Popen(
                [sys.executable, "-c", _PARENT, *command, _ENTER, "sh", *map(str, (private, cache))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._parent.stdout is not None
        with self._parent.stdout as answer:
            self._pid = int(answer.readline())

    def __enter__(self) -> Self:
        try:
            # before that name is there, the process may still be in the host's namespace
            self._wait_for(lambda: Path(f"/proc/{self._pid}/comm").read_text() == "libvirtd\n")
            self._namespace = os.open(f"/proc/{self._pid}/ns/mnt", os.O_RDONLY)
            self._wait_for(lambda: self.virsh("version", check=False).returncode == 0)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for name in self.virsh("list", "--name").stdout.split():
                self.virsh("destroy", name, check=False)
        finally:
            self._stop()

    def _stop(self) -> None:
        # what is left when a test failed half-way: nothing of it may outlive the test
        run = Path(f"/proc/{self._pid}/root/run/libvirt/qemu")
        left = [int(path.read_text()) for path in run.glob("*.pid")] if self._namespace >= 0 else []
        self._kill_daemon()
        self._parent.kill()
        self._parent.wait()
        if self._namespace >= 0:
            os.close(self._namespace)
        for keeper in Path(os.environ["VMREWIND_RUNTIME_DIR"]).glob("*/keeper.json"):
            keeping = Keeping.read(VmPaths(keeper.parent.name))
            if keeping is not None:
                left += [p.pid for p in (keeping.keeper, keeping.capture, keeping.ship) if p is not None and p.alive]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not condition():
            if not Path(f"/proc/{self._pid}/ns/mnt").exists() or time.monotonic() > deadline:
                raise AssertionError(f"libvirtd did not come up:\n{self.log.read_text()}")
            time.sleep(0.02)

    def restart(self) -> None:
        """Kill libvirtd, as an upgrade or a crash does, and start it again; domains run on meanwhile."""
        self._kill_daemon()
        with self.log.open("ab") as log:
            command = [*self._entering, "setpriv", "--pdeathsig", "KILL", "libvirtd"]
            self._again = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self._namespace])
        self._pid = self._again.pid
        self._wait_for(lambda: self.virsh("version", check=False).returncode == 0)

    def _kill_daemon(self) -> None:
        with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(self._pid)) as process:
            signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
            # Not select(), which knows no descriptor beyond 1023: a worker of many tests may have that many.
            ended = select.poll()
            ended.register(process, select.POLLIN)
            ended.poll()
        if self._again is not None:
            self._again.wait()

    @property
    def _entering(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/self/fd/{self._namespace}", "--"]

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside the namespace; with ``check``, its failure fails the test with its output."""
        done = subprocess.run(
            [*self._entering, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_TIMEOUT_SECONDS,
            pass_fds=[self._namespace],
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def virsh(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run virsh."""
        return self.run("virsh", "--connect", "qemu:///system", *arguments, check=check)

    def vmrewind(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run vmrewind inside the namespace, as ``run`` does."""
        done = commands(arguments, self._namespace)
        if check and done.returncode != 0:
            raise AssertionError(f"vmrewind {arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def popen(self, *arguments: str | Path, stdout: IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start vmrewind and go on; its process id is the one returned."""
        command = [*self._entering, sys.executable, "-P", "-m", "vmrewind.cli.main", *map(str, arguments)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, pass_fds=[self._namespace], cwd=self.directory
        )

    @property
    def repository(self) -> Path:
        """A repository, made when it is first asked for."""
        path = self.directory / "repository"
        if not path.exists():
            self.vmrewind("init", path)
        return path

    def protect(self, name: str, *targets: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Protect disks of a domain. The journal is small: it is preallocated."""
        disks = [word for target in targets for word in ("--disk", target)]
        small = ["--journal-size", "256MiB"]
        return self.vmrewind("protect", name, *disks, "--repository", self.repository, *small, *options)

    def define(self, xml: str) -> None:
        """Define a domain."""
        path = self.directory / "domain.xml"
        path.write_text(xml)
        self.virsh("define", path)

    def stored_xml(self, name: str) -> str:
        """The domain's XML as its next start uses it, byte for byte."""
        return self.virsh("dumpxml", "--inactive", "--security-info", name).stdout
