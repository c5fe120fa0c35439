"""A Linux kernel with its modules, from Debian's cloud kernel package, unpacked into a cache and never installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

META_PACKAGE = "linux-image-cloud-amd64"
"""Depends on the current kernel; that kernel's disk drivers are modules, its ext4 is built in."""


class GuestError(Exception):
    """A guest could not be built or did not do what it was waited for."""


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A bootable kernel. ``modules`` is the tree of ``*.ko`` files that belongs to it."""

    kernel: Path
    modules: Path

    def module_files(self, names: Iterable[str]) -> list[Path]:
        """The files of these modules and of all that they need, in the order in which they must be loaded."""
        available = {path.stem.replace("-", "_"): path for path in self.modules.rglob("*.ko")}
        ordered: dict[str, Path] = {}

        def add(name: str) -> None:
            if name in ordered:
                return
            if name not in available:
                raise GuestError(f"{self.modules}: the kernel has no module {name}")
            for needed in _depends(available[name]):
                add(needed)
            ordered[name] = available[name]

        for name in names:
            add(name.replace("-", "_"))
        return list(ordered.values())


def cache_directory() -> Path:
    """Where kernels and initramfs images are kept: ``VMREWIND_GUEST_CACHE``, or the user's cache directory."""
    if given := os.environ.get("VMREWIND_GUEST_CACHE"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmrewind-guests"


def linux(cache: Path | None = None) -> LinuxGuest:
    """The cached kernel, fetched first if there is none. Safe to call from several processes at once.

    Raises GuestError when the package can't be had.
    """
    cache = cache or cache_directory()
    with locked(cache):
        trees = sorted(path for path in cache.glob("linux-*") if path.is_dir())
        tree = trees[-1] if trees else _fetch(cache)
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    modules = sorted((tree / "lib/modules").glob("*/kernel"))
    if not kernels or not modules:
        raise GuestError(f"{tree}: holds no kernel; remove it and run again")
    return LinuxGuest(kernels[-1], modules[-1])


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Hold the cache alone. Made if it does not exist."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(cache: Path) -> Path:
    """Download and unpack; the tree gets its name only when it is complete."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as work_name:
        work = Path(work_name)
        try:
            deb = _download(work, ())
        except GuestError:
            # No package lists on this machine, or stale ones: fresh lists of our own, which needs no root.
            private = work / "apt"
            (private / "lists").mkdir(parents=True)
            options = (f"Dir::State::lists={private}/lists", f"Dir::Cache={private}/cache")
            _apt(work, options, "apt-get", "update")
            deb = _download(work, options)
        subprocess.run(["dpkg-deb", "-x", deb, work / "tree"], check=True)
        target = cache / f"linux-{deb.name.split('_')[1]}"
        shutil.rmtree(target, ignore_errors=True)
        (work / "tree").rename(target)
    return target


def _download(work: Path, options: tuple[str, ...]) -> Path:
    shown = _apt(work, options, "apt-cache", "--no-all-versions", "show", META_PACKAGE)
    found = re.search(r"^Depends:.*?(linux-image-[^\s,]+)", shown, re.MULTILINE)
    if not found:
        raise GuestError(f"apt knows no kernel package that {META_PACKAGE} depends on")
    _apt(work, options, "apt-get", "-q", "download", found[1])
    return next(work.glob("linux-image-*.deb"))


def _apt(work: Path, options: tuple[str, ...], *command: str) -> str:
    arguments = [command[0], *(word for option in options for word in ("-o", option)), *command[1:]]
    done = subprocess.run(arguments, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _depends(module: Path) -> list[str]:
    """The names in a module's ``depends=`` tag (section .modinfo: NUL-terminated strings)."""
    found = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []
