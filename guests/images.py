"""Disk images for guests, made without root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def ext4_image(path: Path, size_bytes: int) -> Path:
    """A sparse raw image of ``size_bytes`` that holds an empty ext4 file system."""
    raw_image(path, size_bytes)
    # Without lazy initialisation the guest's own writes are the only ones.
    options = "lazy_itable_init=0,lazy_journal_init=0,discard,root_owner=0:0"
    # An I/O error must show: a file system that turns read-only makes every later write fail.
    subprocess.run([tool("mke2fs"), "-q", "-F", "-t", "ext4", "-m", "0", "-e", "remount-ro", "-E", options, path], check=True)
    return path


def raw_image(path: Path, size_bytes: int) -> Path:
    """A sparse raw image of zeroes."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def qcow2_image(path: Path, size_bytes: int) -> Path:
    """An empty qcow2 image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes)], check=True)
    return path


def qcow2_overlay(path: Path, backing: Path, backing_format: str = "raw") -> Path:
    """An empty qcow2 image above ``backing``, which is named by its absolute path."""
    options = ["-f", "qcow2", "-b", str(backing.absolute()), "-F", backing_format]
    subprocess.run(["qemu-img", "create", "-q", *options, path], check=True)
    return path


def qcow2_to_raw(path: Path, raw: Path) -> Path:
    """What a guest sees of a qcow2 image, as a raw one."""
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw


def replay_and_check_ext4(image: Path) -> str:
    """Replay an ext4 journal in place, then check the file system without changing it; returns what is wrong, or ""."""
    replayed = _run("e2fsck", "-fy", "-E", "journal_only", image)
    if replayed.returncode not in (0, 1):
        return f"journal replay: {replayed.stdout}{replayed.stderr}"
    checked = _run("e2fsck", "-fn", image)
    return "" if checked.returncode == 0 else f"check: {checked.stdout}{checked.stderr}"


def ext4_files(image: Path, target: Path) -> Path:
    """Copy an ext4 image's files out into the new directory ``target``; the image is not changed."""
    target.mkdir()
    done = _run("debugfs", "-R", f"rdump / {target}", image)
    # debugfs always exits 0, prints its version to stderr, and can't set the owner without root.
    wrong = [line for line in done.stderr.splitlines()[1:] if "changing ownership" not in line]
    if done.returncode or wrong:
        raise OSError(f"{image}: {' '.join(wrong)}")
    return target


def tool(name: str) -> str:
    """The path of a program that may lie in an sbin directory, which not every user's PATH has."""
    for directory in (*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"):
        if (path := Path(directory) / name).exists():
            return str(path)
    raise FileNotFoundError(f"{name} is missing: run script/bootstrap")


def _run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
