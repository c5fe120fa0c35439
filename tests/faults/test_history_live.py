"""Looking at a journal that another process is writing, rolling over segments, at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.history_tools import VM
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.repository.repository import Repository

SIZE = 8192
SLOTS = 16

WRITER = """
import sys, threading
from pathlib import Path
from tests.history_tools import MadeHistory
made = MadeHistory(Path(sys.argv[1]), {"vda": 8192}, journal_size=64 << 20)
made.start()
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
i = 0
while not ended.is_set() and i < 90_000:
    made.disk("vda").states.clear()
    made.write("vda", i % 16 * 512, i.to_bytes(8, "little") * 64)
    i += 1
"""


def content_after(seq: int) -> bytes:
    """What the writer's disk holds after record ``seq``: record 1 is the start, record n writes n - 2 into its slot."""
    content = bytearray(SIZE)
    for i in range(max(0, seq - 1 - SLOTS), seq - 1):
        content[i % SLOTS * 512 : i % SLOTS * 512 + 512] = i.to_bytes(8, "little") * 64
    return bytes(content)


def test_what_is_seen_of_a_growing_journal_is_whole(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        repository = Repository.open(str(tmp_path / "repo")).vm(VM)
        seen = []
        while len(seen) < 8:
            with History.open(VM, tmp_path / "journal", repository) as history:
                branch = history.branch()
                # The writer's clock is not ours.
                position = resolve(history, branch, "latest", ["vda"], 1 << 62)
                view = View.open(history, "vda", position)
                assert view.read(0, SIZE) == content_after(position.seq)
                seen.append(position.seq)
        writer.communicate()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3, "the journal did not grow while it was looked at"
