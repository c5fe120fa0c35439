"""The journal of ext3 and ext4 counted in: what e2fsck's replay of the same journal leaves in place."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from guests.images import raw_image, tool
from tests.file_systems import MIB, Held, run
from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Over
from vmrewind.recover.files.ext_journal import crc32c, pending, replayed

FEATURES = {
    "metadata_csum": ("ext4", "^fast_commit", 4096),
    "metadata_csum_1k": ("ext4", "64bit,metadata_csum", 1024),
    "no_csum": ("ext4", "^metadata_csum,^64bit", 1024),
    "64bit_no_csum": ("ext4", "^metadata_csum,64bit", 4096),
    "ext3": ("ext3", "has_journal", 1024),
}


def journaled(directory: Path, features: str, seed: int = 3) -> tuple[Path, int, list[int]]:
    """An image whose journal holds four transactions: blocks written again, revoked, written after that, and one that looks like a
    journal's own; its block size, and the blocks that were written."""
    kind, options, block = FEATURES[features]
    chosen = random.Random(seed)
    image = raw_image(directory / "image", 24 * MIB)
    run("mke2fs", "-q", "-F", "-t", kind, "-b", block, "-O", options, "-J", "size=4", image)
    last = 24 * MIB // block - 1
    targets = chosen.sample(range(last * 3 // 4, last), 30)
    lines = ["jo"] if kind == "ext3" or "^metadata_csum" in options else ["jo -c"]

    def transaction(number: int, blocks: list[int], revoked: list[int]) -> None:
        content = directory / f"content-{number}"
        pieces = [chosen.randbytes(block) for _ in blocks]
        pieces[0] = b"\xc0\x3b\x39\x98" + pieces[0][4:]
        content.write_bytes(b"".join(pieces))
        lines.append(f"jw -b {','.join(map(str, blocks))} {content}")
        if revoked:
            lines.append(f"jw -r {','.join(map(str, revoked))}")

    transaction(1, targets[:20], [])
    transaction(2, targets[10:25], targets[:3] + targets[12:14])
    transaction(3, [targets[1], targets[27]], [targets[27]])
    transaction(4, [targets[27], targets[29]], [])
    done = subprocess.run(
        [tool("debugfs"), "-w", "-f", "-", image], input="\n".join([*lines, "jc"]), capture_output=True, text=True, check=True
    )
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return image, block, targets


@pytest.mark.parametrize("features", FEATURES)
def test_what_is_counted_in_is_what_e2fsck_replays(tmp_path: Path, features: str) -> None:
    image, block, targets = journaled(tmp_path, features)
    before = image.read_bytes()
    assert pending(Held(before)) >= 4
    size, held = replayed(Held(before))
    assert size == block
    shutil.copy(image, tmp_path / "truth")
    done = subprocess.run([tool("e2fsck"), "-fy", "-E", "journal_only", tmp_path / "truth"], capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stdout
    truth = (tmp_path / "truth").read_bytes()
    seen = Over(Held(before), block, held)
    for target in targets:
        assert seen.read(target * block, block) == truth[target * block : (target + 1) * block], target
    assert set(held) <= set(targets) and any(
        truth[t * block : (t + 1) * block] != before[t * block : (t + 1) * block] for t in targets
    )
    assert pending(Held(truth)) == 0 and replayed(Held(truth))[1] == {}
    # In pieces that begin and end anywhere, too.
    place = targets[20] * block - 700
    assert seen.read(place, 3000) == b"".join(seen.read(at, 1) for at in range(place, place + 3000))


def test_a_damaged_transaction_is_not_replayed(tmp_path: Path) -> None:
    image, block, _ = journaled(tmp_path, "metadata_csum")
    content = bytearray(image.read_bytes())
    place = content.index((tmp_path / "content-2").read_bytes()[block : 2 * block])
    content[place + 17] ^= 1
    with pytest.raises(FileError, match="damaged"):
        replayed(Held(bytes(content)))


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
