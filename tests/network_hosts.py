"""Hosts of their own on one machine, as far as vmrewind goes: each a network namespace with its own state and runtime directories.

They reach nothing but the namespace in the middle, where the object store is. Making them needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}(this test needs root, iproute2 and network namespaces)"


def enter(namespace: Path | str) -> None:
    """Move this thread, and what it starts from now on, into a network namespace."""
    fd = os.open(namespace, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Host:
    """A host: its network, and where vmrewind keeps its state on it."""

    name: str
    link: str
    state: Path
    runtime: Path

    @contextmanager
    def here(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """What is called and started within runs on the host."""
        with monkeypatch.context() as patch, inside(self.name):
            patch.setenv("VMREWIND_STATE_DIR", str(self.state))
            patch.setenv("VMREWIND_RUNTIME_DIR", str(self.runtime))
            yield


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(Path("/run/netns") / namespace)
        yield
    finally:
        enter(f"/proc/self/fd/{before}")
        os.close(before)


class Network:
    """Hosts around ``middle``, a namespace. ``address`` is where they find it."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.directory = directory
        self.middle = f"vmr{os.getpid()}m"
        self.hosts: dict[str, Host] = {}
        self._names = names

    def __enter__(self) -> Network:
        self._add(self.middle)
        try:
            for number, name in enumerate(self._names):
                self.hosts[name] = self._host(name, number)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _add(self, namespace: str) -> None:
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")

    def _host(self, name: str, number: int) -> Host:
        namespace, link = f"vmr{os.getpid()}{name}", f"v{os.getpid()}{name}"
        self._add(namespace)
        runtime = Path(tempfile.mkdtemp(prefix="vmr-"))
        host = Host(namespace, link, self.directory / name / "state", runtime)
        self.hosts[name] = host
        ip("-n", self.middle, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        for where, device, last in ((self.middle, link, 1), (namespace, "eth0", 2)):
            ip("-n", where, "address", "add", f"10.213.{number}.{last}/24", "dev", device)
            ip("-n", where, "link", "set", device, "up")
        # One address of the store for all of them.
        ip("-n", namespace, "route", "add", "default", "via", f"10.213.{number}.1")
        return host

    @property
    def address(self) -> str:
        """The middle's, from every host."""
        return "10.213.0.1"

    def cut(self, host: Host) -> None:
        ip("-n", self.middle, "link", "set", host.link, "down")

    def join(self, host: Host) -> None:
        ip("-n", self.middle, "link", "set", host.link, "up")

    def _remove(self) -> None:
        for namespace in [host.name for host in self.hosts.values()] + [self.middle]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        for host in self.hosts.values():
            shutil.rmtree(host.runtime, ignore_errors=True)
