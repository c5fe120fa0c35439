"""Another local user, with no rights but everybody's: what it can get at, and what it can put in the way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

NOBODY = 65534
VM = "alone"
"""The VM whose places are tampered with, in ``state`` and ``run`` below a shared directory."""

_PROBE = """\
import json, os, socket, stat, sys
got = []
for path in json.load(sys.stdin):
    def attempt(what, act):
        try:
            act()
        except OSError:
            return
        got.append(f"{what} {path}")
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        mode = None
    def connect(kind=socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.settimeout(5)
            sock.connect(path)
    attempt("connect", connect)
    attempt("list", lambda: os.listdir(path))
    attempt("make", lambda: os.close(os.open(path + "/.planted", os.O_CREAT | os.O_WRONLY)))
    attempt("link", lambda: os.link(path, sys.argv[1] + "/link"))
    attempt("rename", lambda: os.rename(path, path + ".gone"))
    if mode is None or stat.S_ISREG(mode):
        attempt("read", lambda: os.close(os.open(path, os.O_RDONLY)))
        attempt("write", lambda: os.close(os.open(path, os.O_RDWR)))
json.dump(got, sys.stdout)
"""


def as_user(command: Sequence[str | Path], uid: int = NOBODY, gid: int = NOBODY, given: str = "") -> str:
    """Run a command as another user; what it prints. Its failure fails the test."""
    words = ["setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--", *map(str, command)]
    done = subprocess.run(words, input=given, capture_output=True, text=True, check=False, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gets_at(tops: Sequence[Path], writable: Path, uid: int = NOBODY, gid: int = NOBODY) -> list[str]:
    """What a user can do with anything at or below ``tops``: ``["read /…", "connect /…", …]``.

    It knows every path, though it may not be able to list one; ``writable`` is a directory of its own on the same file system.
    """
    paths = [str(path) for path in paths_below(tops)]
    assert len(paths) > len(tops), "there is nothing to get at"
    got: list[str] = json.loads(as_user(["/usr/bin/python3", "-I", "-c", _PROBE, writable], uid, gid, json.dumps(paths)))
    return got


def paths_below(tops: Sequence[Path]) -> list[Path]:
    """``tops`` and all below them, while others work there: what goes away meanwhile may be among them or not."""
    below = [Path(at, name) for top in tops for at, directories, files in os.walk(top) for name in directories + files]
    return [*tops, *sorted(below)]


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment as it was started with."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.partition("=")[::2] for word in words if word)


def command_lines() -> list[str]:
    """Every process's command line, as ps shows it to everybody."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                lines.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return lines


# What another user, or a careless one, may have made where vmrewind is to make its own. Each returns what is to be said of it.


def foreign_state(place: Path) -> str:
    as_user(["mkdir", place / "state"])
    return "another user"


def foreign_runtime(place: Path) -> str:
    as_user(["mkdir", place / "run"])
    return "another user"


def foreign_link(place: Path) -> str:
    (place / "mine").mkdir()
    as_user(["ln", "-s", place / "mine", place / "run"])
    return "another user"


def open_runtime(place: Path) -> str:
    (place / "run" / VM).mkdir(parents=True)
    (place / "run" / VM).chmod(0o777)
    return "every user"


def open_state(place: Path) -> str:
    (place / "state" / "vms").mkdir(parents=True)
    (place / "state" / "vms").chmod(0o1777)
    return "every user"


def open_above(place: Path) -> str:
    place.chmod(0o777)
    return "every user"


def open_journal(place: Path) -> str:
    journal = place / "state" / "vms" / VM / "journal"
    journal.mkdir(parents=True)
    journal.chmod(0o1777)
    return "every user"


def foreign_journal(place: Path) -> str:
    journal = place / "state" / "vms" / VM / "journal"
    journal.mkdir(parents=True)
    os.chown(journal, NOBODY, NOBODY)
    return "another user"
