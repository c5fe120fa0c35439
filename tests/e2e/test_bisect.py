"""``vmrewind bisect``: the write after which a command fails is found, whatever lies around it."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests.images import ext4_image
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import qemu_command
from tests.history_tools import VM, MadeHistory, exit_code_of_main
from vmrewind.journal.runs import Discontinuity
from vmrewind.recover.bisect import Verdict, narrow

MIB = 1 << 20
SOUND = 'nbdcopy "$VMREWIND_URI" {copy} && dumpe2fs -h {copy} >&2'
"""A test of an ext4 superblock, by everyday tools."""


Bisect = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def bisect(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bisect:
    def run(
        made: MadeHistory, first: int, last: int, script: str | None, *more: str, qemu: list[str] | None = None
    ) -> tuple[int, list[dict[str, Any]]]:
        config = made.directory / f"{VM}.toml"
        config.write_text(
            f'name = "{VM}"\n[qemu]\ncommand = {json.dumps(qemu or ["true"])}\n'
            f'[protection]\nenabled = true\nrepository = "{made.repository_path}"\n'
            f'journal = "{made.journal}"\n[[protection.disk]]\ntarget = "vda"\nimage = "{made.directory}/vda.raw"\n'
        )
        words = ["bisect", str(config), "--from", f"seq:{first}", "--to", f"seq:{last}", "--json", *more]
        monkeypatch.setattr(sys, "argv", ["vmrewind", *words, *(["--", "sh", "-c", script] if script else [])])
        capfd.readouterr()
        code = exit_code_of_main()
        return code, [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return run


@pytest.fixture
def ext4(tmp_path: Path) -> tuple[MadeHistory, int, int, int]:
    """(a history of a disk with an ext4, its first seq, the seq of the write that breaks its superblock, the last seq)."""
    made = MadeHistory(tmp_path, {"vda": 2 * MIB})
    made.disk("vda").content[:] = ext4_image(tmp_path / "ext4.raw", 2 * MIB).read_bytes()
    made.start()
    first = made.infos[made.run].first_seq
    tail = 2 * MIB - 4096
    for number in range(40):
        made.write("vda", tail, bytes([number]) * 512)
    broken = made.write("vda", 1024 + 0x38, b"\0" * 2)  # the magic number
    for number in range(30):
        made.write("vda", tail, bytes([number]) * 512)
    last = made.stop().seq
    return made, first, broken, last


def test_the_write_that_breaks_a_file_system_is_found(
    ext4: tuple[MadeHistory, int, int, int], bisect: Bisect, tmp_path: Path
) -> None:
    made, first, broken, last = ext4
    code, lines = bisect(made, first, last, SOUND.format(copy=shlex.quote(str(tmp_path / "copy"))))
    *tests, found = lines
    assert code == 0 and found["exact"] and found["tests"] == len(tests) <= 3 + math.ceil(math.log2(71))
    assert found["first_bad"] == {
        "run": found["first_bad"]["run"],
        "seq": broken,
        "time_ns": made.times[broken],
        "disk": "vda",
        "op": "write",
        "offset": 1024 + 0x38,
        "length": 2,
    }
    assert found["last_good"]["seq"] == broken - 1
    assert all((test["verdict"] == "good") == (test["seq"] < broken) for test in tests)


def test_what_cannot_be_tested_is_skipped_and_told_if_it_hides_the_answer(
    ext4: tuple[MadeHistory, int, int, int], bisect: Bisect, tmp_path: Path
) -> None:
    made, first, broken, last = ext4
    sound = SOUND.format(copy=shlex.quote(str(tmp_path / "copy")))
    middle = (first + last) // 2
    code, lines = bisect(
        made, first, last, f"[ $VMREWIND_SEQ -ge {middle - 3} -a $VMREWIND_SEQ -lt {middle + 2} ] && exit 125; {sound}"
    )
    assert code == 0 and lines[-1]["exact"] and lines[-1]["first_bad"]["seq"] == broken
    assert "skip" in {line["verdict"] for line in lines[:-1]}
    code, lines = bisect(made, first, last, f"[ $VMREWIND_SEQ -eq {broken} ] && exit 125; {sound}")
    assert code == 1 and not lines[-1]["exact"] and lines[-1]["candidates"] == 2
    assert (lines[-1]["last_good"]["seq"], lines[-1]["first_bad"]["seq"]) == (broken - 1, broken + 1)


def test_ends_that_are_not_good_and_bad_and_commands_that_give_up(ext4: tuple[MadeHistory, int, int, int], bisect: Bisect) -> None:
    made, first, _, last = ext4
    for script, exit_code, words in (
        ("exit 1", 2, "--from"),
        ("exit 0", 2, "--to"),
        ("exit 125", 2, "cannot be tested"),
        ("exit 130", 1, "exit code 130"),
        ("kill -TERM $$", 1, "signal 15"),
    ):
        code, lines = bisect(made, first, last, script)
        assert code == exit_code and words in lines[-1]["message"] and len(lines) <= 3
    assert bisect(made, last, first, "exit 0")[0] == 2
    assert bisect(made, last - 1, last, "exit 0")[0] == 2, "nothing was written in between"
    assert not list(Path(os.environ["VMREWIND_RUNTIME_DIR"]).glob("*/*.sock"))


def test_what_a_command_writes_is_gone_with_its_moment(bisect: Bisect, tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": MIB})
    made.start()
    first = made.infos[made.run].first_seq
    for number in range(1, 20):
        made.write("vda", 512 * number, b"\xee" * 512)
    last = made.stop().seq
    # Bad from the tenth write on, or if anything is left of another test's writing.
    io = 'qemu-io -f raw -c "read -P {} {} 512" "$VMREWIND_URI_VDA" | grep -q failed'
    script = f"{io.format(0, 65536)} && exit 130; {io.format(0, 5120)} && exit 1; "
    script += 'qemu-io -f raw -c "write -P 9 65536 512" "$VMREWIND_URI" >&2'
    code, lines = bisect(made, first, last, script, "--writable")
    assert code == 0 and lines[-1]["first_bad"]["offset"] == 5120
    code, lines = bisect(made, first, last, 'qemu-io -f raw -c "write 0 512" "$VMREWIND_URI" >&2')
    assert "--from" in lines[-1]["message"], "without --writable a write fails"


def test_what_changed_in_a_gap_is_blamed_on_the_gap_and_not_on_a_write(bisect: Bisect, tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": MIB})
    made.start()
    first = made.infos[made.run].first_seq
    for number in range(5):
        made.write("vda", 512 * number, b"\1" * 512)
    end = made.stop()
    made.disk("vda").content[-512:] = b"\xff" * 512  # by nobody's record
    made.tick()
    made.start(
        parent=end, bases=["vda"], gaps={"vda": Discontinuity("the image was changed while the VM was off", end.time_ns + 1)}
    )
    for number in range(5):
        made.write("vda", 512 * number, b"\2" * 512)
    last = made.stop().seq
    script = f'qemu-io -r -f raw -c "read -P 0 {MIB - 512} 512" "$VMREWIND_URI" | grep -q failed && exit 1; exit 0'
    code, lines = bisect(made, first, last, script)
    assert code == 0 and lines[-1]["first_bad"]["op"] == "gap" and lines[-1]["first_bad"]["seq"] == made.infos[made.run].first_seq
    assert lines[-1]["last_good"]["seq"] == end.seq - 1


def test_a_moment_that_cannot_be_read_is_skipped_whatever_the_command_says(bisect: Bisect, tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": MIB})
    made.start()
    first = made.infos[made.run].first_seq
    for number in range(1, 9):
        made.write("vda", 512, bytes([number]) * 512)
    last = made.stop().seq
    (segment,) = made.segment_paths()
    content = bytearray(segment.read_bytes())
    content[content.index(b"\5" * 512)] ^= 1
    segment.write_bytes(content)
    # The command itself finds nothing wrong with what it cannot read.
    script = f'qemu-io -r -f raw -c "read 512 512" "$VMREWIND_URI" >&2; [ $VMREWIND_SEQ -lt {first + 5} ]'
    code, lines = bisect(made, first, last, script)
    assert code == 1 and not lines[-1]["exact"]
    verdicts = {line["seq"]: line["verdict"] for line in lines[:-1]}
    assert verdicts.pop(first + 5) == "skip" and set(verdicts.values()) == {"good", "bad"}
    assert (lines[-1]["last_good"]["seq"], lines[-1]["first_bad"]["seq"]) == (first + 4, first + 6)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.sets(st.integers(0, n - 1)))))
def test_the_answer_is_right_whatever_is_skipped(drawn: tuple[int, int, set[int]]) -> None:
    count, first_bad, unknown = drawn
    unknown -= {count - 1}
    tried = []

    def judge(at: int) -> Verdict:
        tried.append(at)
        return Verdict.SKIP if at in unknown else Verdict.BAD if at >= first_bad else Verdict.GOOD

    good, bad = narrow(count, judge)
    assert len(tried) == len(set(tried)) and good < first_bad <= bad
    assert set(range(good + 1, bad)) <= unknown
    if not unknown:
        assert len(tried) <= math.ceil(math.log2(count)) + 1


def test_the_write_after_which_it_does_not_boot_is_found(tmp_path: Path, bisect: Bisect) -> None:
    made = MadeHistory(tmp_path, {"vda": 2 * MIB})
    made.disk("vda").content[:] = ext4_image(tmp_path / "ext4.raw", 2 * MIB).read_bytes()
    made.start()
    first = made.infos[made.run].first_seq
    made.write("vda", 2 * MIB - 4096, b"1" * 512)
    broken = made.write("vda", 1024 + 0x38, b"\0" * 2)
    last = made.stop().seq
    script = "mount -t ext4 /dev/vda /mnt && { mkdir /mnt/new && echo ALIVE; }"
    command = qemu_command(tmp_path / "serial", linux().kernel, initramfs(script))
    code, lines = bisect(made, first, last, None, "--boot", "--until", "ALIVE", "--scratch", str(tmp_path), qemu=command)
    assert code == 0 and lines[-1]["exact"] and lines[-1]["first_bad"]["seq"] == broken
    assert all((test["verdict"] == "good") == (test["seq"] < broken) for test in lines[:-1])
    for more, words in ((["--boot", "--disk", "vda"], "all of its disks"), (["--until", "x"], "no command"), ([], "no command")):
        code, lines = bisect(made, first, last, None, *more, qemu=command)
        assert code == 2 and words in lines[-1]["message"]
    assert "two tests" in bisect(made, first, last, "exit 0", "--boot", qemu=command)[1][-1]["message"]
    code, lines = bisect(made, first, last, None, "--boot", qemu=["qemu-system-x86_64", "-machine", "nothing"])
    assert code == 10 and "unsupported machine" in lines[-1]["message"], "that QEMU refuses the machine tells nothing of the moment"
