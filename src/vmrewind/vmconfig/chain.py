"""What a qcow2 image stands on: its backing chain, as ``qemu-img info`` tells it.

libvirt follows backing files by itself only from a local file. Once the top image is reached over NBD, the chain must
be spelled out in the domain XML, or the guest would see zeroes wherever the top image has no data of its own.
"""

from __future__ import annotations

import itertools
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmrewind.errors import ImageError

QEMU_IMG_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Backing:
    """One image below the top of a chain. ``kind`` is libvirt's disk type."""

    path: str
    format: str
    kind: Literal["file", "block"]


def backing_chain(image: str) -> list[Backing]:
    """The images below the qcow2 file ``image``, nearest first. Raises ImageError, also for unprotectable chains."""
    infos = _qemu_img_info(image)
    specific = infos[0].get("format-specific", {}).get("data", {})
    if "data-file" in specific:
        raise ImageError(
            f"{image}: keeps its data in another file ({specific['data-file']}), whose writes would not be captured",
            "convert it first: qemu-img convert -O qcow2 (or raw)",
        )
    chain: list[Backing] = []
    for upper, lower in itertools.pairwise(infos):
        recorded = upper.get("backing-filename-format")
        if recorded is None:
            top, backing = upper["filename"], upper.get("backing-filename")
            raise ImageError(
                f"{top}: does not say which format its backing file {backing} has",
                f"record it, if it is so: qemu-img rebase -u -F {lower['format']} -b {backing} {top}",
            )
        path = str(upper.get("full-backing-filename"))
        if not path.startswith("/"):
            raise ImageError(
                f"{upper['filename']}: its backing file {path} is not a local file",
                "only chains of local files and block devices can be protected: flatten it with qemu-img convert",
            )
        chain.append(Backing(path, recorded, "block" if stat.S_ISBLK(Path(path).stat().st_mode) else "file"))
    return chain


def _qemu_img_info(image: str) -> list[dict[str, Any]]:
    # -U: only metadata is read, so an image that some other process holds open is no obstacle here
    command = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", "qcow2", "--", image]
    try:
        done = subprocess.run(command, capture_output=True, timeout=QEMU_IMG_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise ImageError(f"{image}: cannot be examined: there is no qemu-img", "apt install qemu-utils") from None
    except subprocess.TimeoutExpired:
        raise ImageError(
            f"{image}: qemu-img info did not answer within {QEMU_IMG_TIMEOUT_SECONDS} seconds",
            "is its storage reachable?",
        ) from None
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise ImageError(f"{image}: cannot be examined as qcow2: {message}", "is it qcow2, and are its backing files in place?")
    infos: list[dict[str, Any]] = msgspec.json.decode(done.stdout)
    return infos
