"""libvirt's hook: what happens when libvirt starts and stops a protected domain.

``prepare begin`` starts the domain's keeper and waits until every disk is served; ``release end`` stops it and waits until
the journal is finished. A hook never calls libvirt, which waits for it: that would be a deadlock. And libvirt reads the
hook's stdout and stderr to their end: whatever outlives the hook must hold neither.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import ConfigError, StartError, VmrewindError, VmStateError, by_kind
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import private, write_durably
from vmrewind.paths import VmPaths
from vmrewind.start.control import instruct
from vmrewind.start.environment import guard_files
from vmrewind.start.leftovers import connected
from vmrewind.start.places import require_own_places
from vmrewind.start.processes import Process, running
from vmrewind.start.saved_state import note_ended, note_started, refuse_unfit

KEEPER_MODULE: Final = "vmrewind.start.keeper"
MODE: Final = "libvirt"
"""What such a keeper calls itself in ``keeper.json``."""
STOP_TIMEOUT_SECONDS: Final = 300
"""Finishing a journal takes a second or two; what takes minutes hangs on a dead storage and needs an operator."""
EXIT_TIMEOUT_SECONDS: Final = 10
LOG_TAIL_BYTES: Final = 2000
XML_BYTES_MAX: Final = 16 << 20
"""libvirt's own limit for a domain's XML is 10 MB."""


def handle(vm: str, operation: str, sub_operation: str, xml: bytes) -> None:
    """Do what the step asks for; steps that ask for nothing are passed over. Raises VmrewindError."""
    paths = _places(vm)
    match operation, sub_operation:
        case "prepare", "begin":
            prepare(paths, xml)
        case "start", "begin":
            _event(paths, "qemu.started")
        case "started", "begin":
            # a domain that is resumed goes on only after this step
            note_started(paths)
            _event(paths, "cpu.started")
        case "release", "end":
            stop_keeper(paths)
            note_ended(paths)
        case "migrate", "begin":
            refuse_migration(vm, xml)


def _places(vm: str) -> VmPaths:
    """Raises ConfigError for a name that leads elsewhere, or if another user could have put something there."""
    from vmrewind.vmconfig.model import Invalid, check_name, config_error

    try:
        check_name("name", vm)
    except Invalid as error:
        raise config_error(f"domain {vm!r}", error) from None
    paths = VmPaths(vm)
    require_own_places(paths)
    return paths


def prepare(paths: VmPaths, xml: bytes) -> None:
    """Start the keeper and wait until it is ready. One that is left over from an earlier life of the VM is stopped first."""
    _refuse_connected(paths)
    stop_keeper(paths)
    refuse_unfit(paths)
    if not _is_protected(xml):
        return
    document = paths.state / "domain.xml"
    try:
        write_durably(document, xml)
        with open(paths.log, "ab", opener=private) as log:
            _start_keeper(paths, document, log.fileno(), log.tell())
    except OSError as error:
        raise StartError(
            f"{error.filename or paths.state}: {error.strerror}", "make room, or set VMREWIND_STATE_DIR and protect the VM again"
        ) from error


def refuse_migration(vm: str, xml: bytes) -> None:
    """A protected domain's disks look like safe network disks to libvirt, but their server stays behind."""
    if _is_protected(xml):
        raise VmStateError(
            f"{vm} is protected by vmrewind, and this version cannot migrate a protected VM",
            f"shut it down, vmrewind unprotect {vm}, migrate it, protect it there",
        )


def stop_keeper(paths: VmPaths, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> bool:
    """Make the VM's keeper finish, and wait for it. False if there was none. Raises VmStateError."""
    keeping = running(paths)
    if keeping is None:
        return False
    if keeping.mode != MODE:
        raise VmStateError(
            f"{paths.name} is running already, without libvirt (process {keeping.keeper.pid}, mode {keeping.mode})",
            "stop that one first, or give one of the two another name",
        )
    deadline = time.monotonic() + timeout_seconds
    # a keeper that was killed left its children behind: capture first, so that its last records are there for ship to send
    for role in ("keeper", "capture", "server", "ship"):
        process: Process | None = getattr(keeping, role)
        # the keeper ends at SIGTERM only once nobody has the disks; here the VM has ended, whoever else may look at them
        if process is not None and not _end(process, signal.SIGINT if role == "keeper" else signal.SIGTERM, deadline):
            raise VmStateError(
                f"the {role} of {paths.name} (process {process.pid}) did not finish within {timeout_seconds:.0f} seconds",
                f"see {paths.log}: is the journal's storage reachable?",
            )
    return True


def _end(process: Process, number: signal.Signals, deadline: float) -> bool:
    """Send a signal and wait for the end; False if it did not come in time."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        if process.alive:  # looked at now that the descriptor pins it: the pid cannot go to another process any more
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(descriptor)
    return True


def _refuse_connected(paths: VmPaths) -> None:
    """A QEMU that libvirt has lost sight of would come back to the next capture's socket, beside the new QEMU."""
    keeping = running(paths)
    if keeping is None:
        return
    if keeping.server is not None and connected(paths.nbd_socket):
        raise VmStateError(
            f"{paths.name}: a QEMU that libvirt does not know of is still connected to its disks",
            f"end that QEMU first (fuser {paths.nbd_socket} helps to find it)",
        )
    try:
        disks = instruct(paths, command="status")["disks"]
    except VmrewindError:
        return  # its capture is gone, and with it every connection
    if in_use := [target for target, disk in disks.items() if disk["clients"]]:
        raise VmStateError(
            f"{paths.name}: a QEMU that libvirt does not know of is still connected to {', '.join(in_use)}",
            f"end that QEMU first (fuser {paths.nbd_socket} helps to find it)",
        )


def _start_keeper(paths: VmPaths, document: Path, log: int, log_end: int) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as report:
        try:
            command = [sys.executable, "-P", "-m", KEEPER_MODULE, "--domain", paths.name]
            keeper = subprocess.Popen(
                [*command, "--report-fd", str(writer), "--xml", str(document)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(writer)
        line = report.readline()
    try:
        answer: Any = json.loads(line)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and answer.get("ok") is True:
        keeper.returncode = 0  # it lives on without us: nothing to wait for, nothing to warn about
        return
    try:
        code = keeper.wait(EXIT_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.terminate()
        code = keeper.wait()
    if isinstance(answer, dict) and answer.get("ok") is False:
        raise by_kind(str(answer.get("kind")), str(answer.get("message")), str(answer.get("hint") or ""))
    raise StartError(
        f"the keeper of {paths.name} ended before it was ready (exit code {code}){_tail(paths.log, log_end)}",
        f"see {paths.log}",
    )


def _event(paths: VmPaths, event: str) -> None:
    keeping = running(paths)
    if keeping is not None:
        EventLog(paths.events(int(keeping.run, 16))).write(event)


def _is_protected(xml: bytes) -> bool:
    """Whether the domain is to have a keeper, which reads the XML strictly. Raises ConfigError if that cannot be told."""
    if b"urn:vmrewind:protection:" not in xml:
        return False
    from vmrewind.vmconfig.domain import parse_domain, peek_storage

    return peek_storage(xml) is not None or parse_domain(xml) is not None


def _tail(log: Path, start: int) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace").strip()
    except OSError:
        return ""
    return f": {text.splitlines()[-1]}" if text else ""


def main(arguments: list[str]) -> int:
    """The hook's process: domain, operation, sub-operation and extra argument as libvirt gives them, the XML on stdin."""
    guard_files()
    vm, operation, sub_operation = (*arguments, "", "", "")[:3]
    try:
        xml = sys.stdin.buffer.read(XML_BYTES_MAX + 1)
        if len(xml) > XML_BYTES_MAX:
            raise ConfigError(f"domain {vm!r}: its XML has more than {XML_BYTES_MAX} bytes", "virsh dumpxml shows what it holds")
        handle(vm, operation, sub_operation, xml)
    except VmrewindError as error:
        # libvirt shows a failed hook's stderr to whoever started the domain
        sys.stderr.write(f"vmrewind: {error.in_full}\n")
        return 0 if operation == "reconnect" else error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
