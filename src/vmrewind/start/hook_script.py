"""The script in libvirt's hooks directory, and putting it there.

It is a few lines of shell, because libvirt runs it at every step of every domain: a domain that is not protected costs no
more than a shell and a ``cat``. For a protected one it hands over to ``vmrewind.start.hook``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import LibvirtError
from vmrewind.journal.runs import sync_directory, write_durably
from vmrewind.paths import runtime_root, state_root

HOOKS_DIRECTORY: Final = Path("/etc/libvirt/hooks")
HOOKS_DIRECTORY_VARIABLE: Final = "VMREWIND_LIBVIRT_HOOKS"
DROP_IN_SINCE: Final = 6_005_000
"""libvirt 6.5.0 is the first that runs every script of ``hooks/qemu.d``; before, there is one script, ``hooks/qemu``."""
MARK: Final = "# vmrewind: libvirt hook"
RELOAD_THREAD: Final = "daemon-reload"
RELOAD_BEGINS_SECONDS: Final = 0.5
RELOAD_SECONDS_MAX: Final = 30
DAEMONS: Final = {"libvirtd": Path("/run/libvirtd.pid"), "virtqemud": Path("/run/virtqemud.pid")}

_SCRIPT: Final = """\
#!/bin/sh
{mark}. Written by "vmrewind protect", which rewrites it when need be.
# A domain without vmrewind's element in its metadata is none of its business, and "reconnect" never is:
# a failure there would kill a running VM.
case "$2/$3" in
prepare/begin | start/begin | started/begin | release/end | migrate/begin) ;;
*) exit 0 ;;
esac
xml=$(cat)
case $xml in
*urn:vmrewind:protection:*) ;;
*) [ -e {runtime}/"$1"/keeper.json ] || [ -e {state}/vms/"$1"/saved-state.json ] || exit 0 ;;
esac
export VMREWIND_STATE_DIR={state} VMREWIND_RUNTIME_DIR={runtime}
printf '%s\\n' "$xml" | {python} -P -m vmrewind.start.hook "$@"
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """Where the script is, whether it was written just now, and whether there was none before."""

    path: Path
    changed: bool
    fresh: bool


def script() -> bytes:
    """The hook script for this installation: its interpreter and its directories are written into it."""
    return _SCRIPT.format(
        mark=MARK,
        runtime=shlex.quote(str(runtime_root())),
        state=shlex.quote(str(state_root())),
        python=shlex.quote(sys.executable),
    ).encode()


def hook_path(libvirt_version: int) -> Path:
    """Where this version of libvirt looks for the script."""
    directory = hooks_directory()
    return directory / "qemu.d" / "vmrewind" if libvirt_version >= DROP_IN_SINCE else directory / "qemu"


def hooks_directory() -> Path:
    """libvirt's hooks directory; ``VMREWIND_LIBVIRT_HOOKS`` names another."""
    return Path(os.environ.get(HOOKS_DIRECTORY_VARIABLE) or HOOKS_DIRECTORY)


def install(libvirt_version: int) -> Installed:
    """Put the script in place if it is not there yet. A fresh one needs ``reload_daemons``. Raises LibvirtError."""
    path = hook_path(libvirt_version)
    wanted = script()
    try:
        found = path.read_bytes() if path.exists() else None
        if found is not None and MARK.encode() not in found:
            raise LibvirtError(
                f"{path}: there is another hook script, and this libvirt runs only one",
                "move what it does elsewhere, or update libvirt: from 6.5 on it runs every script of hooks/qemu.d",
            )
        if found == wanted and os.access(path, os.X_OK):
            return Installed(path, changed=False, fresh=False)
        # made complete outside of qemu.d, where libvirt would run it half done
        fresh = hooks_directory() / ".vmrewind.new"
        write_durably(fresh, wanted)
        fresh.chmod(0o755)
        if not path.parent.is_dir():
            path.parent.mkdir()
            path.parent.chmod(0o755)
        fresh.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise LibvirtError(f"{path}: the hook script cannot be written: {error.strerror}", "are you root?") from error
    return Installed(path, changed=True, fresh=found is None)


def reload_daemons() -> tuple[str, ...]:
    """Make libvirt's running daemons look for hook scripts, which they do at their start and when told to reload.

    Waits until they have reloaded; returns the names of those that were told.
    """
    told: list[str] = []
    for name, pid_file in DAEMONS.items():
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text())
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                os.kill(pid, signal.SIGHUP)
                told.append(name)
                _wait_for_reload(pid)
    return tuple(told)


def _wait_for_reload(pid: int) -> None:
    """The daemon reloads in a thread of its own, which comes soon after the signal and goes when all is read."""
    began = time.monotonic()
    seen = False
    while time.monotonic() - began < (RELOAD_SECONDS_MAX if seen else RELOAD_BEGINS_SECONDS):
        reloading = RELOAD_THREAD in _thread_names(pid)
        if seen and not reloading:
            return
        seen = seen or reloading
        time.sleep(0.001)


def _thread_names(pid: int) -> set[str]:
    names: set[str] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.add((task / "comm").read_text().strip())
    return names
