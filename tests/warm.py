"""The command line without its loading: one process has the modules and forks for every command; a quarter of a second each saved.

What a fork runs is what the installed script runs, ``vmrewind.cli.main.main``, in a process of its own with its own arguments,
environment, directory and output, in another mount namespace if it is given one. What asks for another interpreter or sees
another network than that process is started.
A directory called ``hooks-of-children`` on PYTHONPATH is for the processes that commands start, which get it from either.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from guests.protected import VMREWIND

TIMEOUT_SECONDS = 600
CHILDREN = "hooks-of-children"
_CLONE_NEWNS = 0x20000
_LENGTH = struct.Struct("<I")
_ROOT = Path(__file__).parents[1]


class WarmCommands:
    """The process, started when it is first needed. It ends with this one, at the latest."""

    def __init__(self) -> None:
        self._address: str | None = None
        self._started_as = self._surroundings()

    def __call__(self, arguments: Sequence[str | Path], mounts: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``vmrewind`` with these arguments, as subprocess.run does with ``capture_output=True, text=True``.

        ``mounts``: descriptor of the mount namespace to run it in.
        """
        words = [str(word) for word in arguments]
        given = [] if mounts is None else [mounts]
        if self._surroundings() != self._started_as:
            enter = ["nsenter", f"--mount=/proc/self/fd/{mounts}", "--"] if given else []
            command = [*enter, str(VMREWIND), *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, pass_fds=given)
        if self._address is None:
            self._address = self._start()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(TIMEOUT_SECONDS)
                connection.connect(self._address)
                asked = json.dumps([words, dict(os.environ), str(Path.cwd())]).encode()
                socket.send_fds(connection, [_LENGTH.pack(len(asked))], [*(file.fileno() for file in (nothing, out, err)), *given])
                connection.sendall(asked)
                answer = connection.recv(16)
            assert answer, f"whoever runs {words} has ended"
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess([VMREWIND, *words], int(answer), *texts)

    def end(self) -> None:
        """End the process; the time that it and its forks took then counts as this one's children's."""
        if self._address is not None:
            self._address = None
            os.close(self._lifeline)
            self._process.wait()

    @staticmethod
    def _surroundings() -> tuple[object, ...]:
        """What a process that runs already does not take over from who asks it."""
        interpreter = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
        path = interpreter.pop("PYTHONPATH", "").split(os.pathsep)
        interpreter["PYTHONPATH"] = os.pathsep.join(part for part in path if Path(part).name != CHILDREN)
        spaces = [Path(f"/proc/thread-self/ns/{kind}").readlink() for kind in ("net", "mnt")]
        return interpreter, spaces, os.getuid(), os.getpid()

    def _start(self) -> str:
        # Nobody else needs to find it: a name in the abstract space, which leaves nothing behind.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\0vmr-warm-" + os.urandom(8).hex())
        listener.listen(64)
        address: bytes = listener.getsockname()
        # Its other end is closed when this process has ended, however it did.
        lifeline, self._lifeline = os.pipe()
        descriptors = (listener.fileno(), lifeline)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", *map(str, descriptors)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=descriptors, cwd=_ROOT,
        )  # fmt: skip
        listener.close()
        os.close(lifeline)
        return address.decode()


commands = WarmCommands()
"""This process's."""


def _load() -> None:
    for package in ("cli", "start", "history", "recover", "repository"):
        for module in pkgutil.iter_modules(importlib.import_module(f"vmrewind.{package}").__path__, f"vmrewind.{package}."):
            importlib.import_module(module.name)
    # Looked at by no collection of a fork's, which would copy all of it.
    gc.collect()
    gc.freeze()


def _command_asked_for(listener: socket.socket, lifeline: int) -> None:
    """Returns in a fork that is to run a command, everything about it being as asked; ends the process when ``lifeline`` does."""
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if lifeline in select.select([listener, lifeline], [], [])[0]:
            os._exit(0)
        connection = listener.accept()[0]
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    os.close(lifeline)
    head, descriptors, *_ = socket.recv_fds(connection, _LENGTH.size, 4)
    asked = connection.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL)
    if command := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        connection.sendall(str(code).encode())
        os._exit(0)
    connection.close()
    for mounts in descriptors[3:]:
        if ctypes.CDLL(None, use_errno=True).setns(mounts, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "the mount namespace cannot be entered")
        os.close(mounts)
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    words, environment, directory = json.loads(asked)
    sys.argv = [str(VMREWIND), *words]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


if __name__ == "__main__":
    _load()
    sys.path[0] = str(VMREWIND.parent)
    _command_asked_for(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    from vmrewind.cli.main import main

    sys.exit(main())
