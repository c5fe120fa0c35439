"""What opens an encrypted repository: a passphrase or a key file, and where a process finds it.

In this order: ``VMREWIND_KEY_FILE``; ``VMREWIND_PASSPHRASE`` or ``VMREWIND_PASSPHRASE_FILE``; ``keys/<repository id>.key`` beside
the environment file (``/etc/vmrewind``). The variables may be in the environment or in that file. At a terminal, if none of these
is given, the passphrase is asked for. No secret is ever part of a message.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import stat
import sys
import threading
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmrewind.errors import RepositoryError, UsageError
from vmrewind.journal.runs import private_directory, sync_directory
from vmrewind.repository.credentials import environment_path, vmrewind_settings

KEY_FILE: Final = "key-file"
PASSPHRASE: Final = "passphrase"

_KEY_FILE_VARIABLE: Final = "VMREWIND_KEY_FILE"
_PASSPHRASE_VARIABLE: Final = "VMREWIND_PASSPHRASE"
_PASSPHRASE_FILE_VARIABLE: Final = "VMREWIND_PASSPHRASE_FILE"
_KEY: Final = re.compile(rb"[0-9a-f]{64}\s*")
_FILE_MAX: Final = 4096
PASSPHRASE_LENGTH_MIN: Final = 8


@dataclass(frozen=True, slots=True)
class Secret:
    """``kind`` is KEY_FILE (then ``value`` is its 32 bytes) or PASSPHRASE; ``origin`` says for messages where it is from."""

    kind: str
    value: bytes = field(repr=False)
    origin: str


def given_secrets() -> list[Secret]:
    """What the variables give. Raises RepositoryError for a file that cannot be used."""
    known = vmrewind_settings()
    found = []
    if path := known.get(_KEY_FILE_VARIABLE):
        found.append(_given_key_file(Path(path), _KEY_FILE_VARIABLE))
    if text := known.get(_PASSPHRASE_VARIABLE):
        found.append(passphrase(text, f"the passphrase in {_PASSPHRASE_VARIABLE}"))
    elif path := known.get(_PASSPHRASE_FILE_VARIABLE):
        found.append(passphrase(_passphrase_in(Path(path)), f"the passphrase in {path}"))
    return found


def find_secrets(repository_id: str, url: str) -> list[Secret]:
    """Everything that may open the repository, in order, at least one.

    Raises RepositoryError if there is none, which names the ways to give one, or for a file that cannot be used.
    """
    found = given_secrets()
    own = key_file_of(repository_id)
    with contextlib.suppress(FileNotFoundError, PermissionError):  # the host's keys are not every user's
        found.append(read_key_file(own, str(own)))
    if not found and at_terminal():
        found.append(passphrase(getpass.getpass(f"Passphrase of {url}: "), "the passphrase that was typed"))
    if not found:
        raise RepositoryError(
            f"{url}: the repository is encrypted, and no key is given",
            f"give one by {_KEY_FILE_VARIABLE}, by {_PASSPHRASE_VARIABLE} (or {_PASSPHRASE_FILE_VARIABLE}), "
            f"or as {own}: docs/repositories.md",
        )
    return found


def key_file_of(repository_id: str) -> Path:
    """Where a host keeps the key file of one repository."""
    return environment_path().parent / "keys" / f"{repository_id}.key"


def at_terminal() -> bool:
    """Whether there is somebody who can be asked: not by a thread that others give only so much time, as a VM's start does."""
    return threading.current_thread() is threading.main_thread() and sys.stdin is not None and sys.stdin.isatty()


def new_passphrase(url: str) -> Secret:
    """A passphrase to be: asked for twice at a terminal, else the first line of standard input. Raises UsageError."""
    if at_terminal():
        text = getpass.getpass(f"New passphrase for {url}: ")
        if getpass.getpass("Once more: ") != text:
            raise UsageError("the two passphrases differ", "try again")
    else:
        text = sys.stdin.readline(_FILE_MAX).rstrip("\r\n")
    return passphrase(text, "the new passphrase")


def passphrase(text: str, origin: str) -> Secret:
    """A passphrase as a secret; the same letters count as the same however they were composed. Raises RepositoryError."""
    if len(text) < PASSPHRASE_LENGTH_MIN:
        raise RepositoryError(
            f"{origin}: shorter than {PASSPHRASE_LENGTH_MIN} characters", "take several words that nobody else would put together"
        )
    return Secret(PASSPHRASE, unicodedata.normalize("NFC", text).encode(), origin)


def read_key_file(path: Path, origin: str) -> Secret:
    """A key file's secret. Raises RepositoryError if it cannot be used, FileNotFoundError and PermissionError as they are."""
    if not _KEY.fullmatch(content := _private_content(path)):
        raise RepositoryError(f"{path}: not a key file", "a key file is one line of 64 hex digits, as vmrewind init made it")
    return Secret(KEY_FILE, bytes.fromhex(content.decode()), origin)


def secret_of_key_file(path: Path) -> Secret:
    """The secret of a key file, which is made if it is not there: then it is durable when this returns. Raises RepositoryError."""
    try:
        if not path.exists():
            _make_key_file(path)
        return read_key_file(path, f"the key file {path}")
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror}", "name another place for the key file") from error


def _make_key_file(path: Path) -> None:
    private_directory(path.parent)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32).hex().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _given_key_file(path: Path, variable: str) -> Secret:
    try:
        return read_key_file(path, f"{path} (by {variable})")
    except OSError as error:
        raise RepositoryError(f"{variable}: {path}: {error.strerror}", "name the key file that is there, or unset it") from error


def _passphrase_in(path: Path) -> str:
    try:
        return _private_content(path).decode().partition("\n")[0].rstrip("\r")
    except OSError as error:
        raise RepositoryError(f"{_PASSPHRASE_FILE_VARIABLE}: {path}: {error.strerror}", "name the file that is there") from error
    except UnicodeDecodeError:
        raise RepositoryError(f"{path}: not UTF-8", "a passphrase is a line of text") from None


def _private_content(path: Path) -> bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise RepositoryError(f"{path}: others than its owner may read or write it", f"chmod 600 {path}")
        return file.read(_FILE_MAX)
