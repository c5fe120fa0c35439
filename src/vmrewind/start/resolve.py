"""From a command's VM argument to everything that the command works on: a VM of this host (a TOML file, a name), or one that a
repository holds (``URL/VM``), for which nothing of this host is looked at."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmrewind.capture.dirty import undeclared_gap
from vmrewind.errors import CorruptionError, RepositoryError, UsageError, VmrewindError, VmStateError
from vmrewind.journal.copy_before_write import begun_base, made_words
from vmrewind.paths import VmPaths
from vmrewind.repository.layout import REPOSITORY
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.vmconfig.model import Invalid, VmConfig, check_name
from vmrewind.vmconfig.toml import load_toml

if TYPE_CHECKING:
    from vmrewind.history.history import History

VM_HELP: Final = "The VM: its TOML file, its name, or URL/VM for one that a repository holds."
_WITH_PLACE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class VmHandle:
    """A VM on this host. ``config`` is None only while nothing but its local state is known."""

    name: str
    config: VmConfig | None

    @property
    def paths(self) -> VmPaths:
        """Its places."""
        return VmPaths(self.name)

    @property
    def journal(self) -> Path:
        """Its journal's directory."""
        given = self.config.protection.journal if self.config else None
        return Path(given) if given else self.paths.default_journal

    @property
    def repository_url(self) -> str | None:
        """Its repository, None if it has none."""
        return self.config.protection.repository if self.config else None

    def require_config(self) -> VmConfig:
        """The configuration; raises VmStateError if it is not known here."""
        if self.config is None:
            raise VmStateError(f"{self.name}: its configuration is not known on this host", "give its TOML file")
        return self.config

    def history(self) -> History:
        """Local journal and repository as one history. An unreachable repository leaves the local part."""
        repository = None
        unreachable: VmrewindError | None = None
        if self.repository_url is not None:
            try:
                repository = Repository.open(self.repository_url).vm(self.name)
            except (RepositoryError, CorruptionError) as error:
                unreachable = error
        # Most commands need no history, and what reads it takes longer to load than they take.
        from vmrewind.history.history import History

        gap = undeclared_gap(self.paths.dirty_map)
        history = History.open(self.name, self.journal, repository, bases=self.paths.bases, problem=unreachable)
        # Asked before and after: one that was declared in between is in the records, or not yet.
        history.undeclared = gap or undeclared_gap(self.paths.dirty_map)
        return history


@dataclass(frozen=True, slots=True)
class StoredVm:
    """A VM as a repository holds it."""

    name: str
    url: str

    def repository(self) -> VmRepository:
        """Its part of the repository. Raises RepositoryError, VmStateError if there is no such VM."""
        repository = Repository.open(self.url)
        vm = repository.vm(self.name)
        if vm.uuid() is None:
            known = repository.vms()
            near = difflib.get_close_matches(self.name, known, n=3, cutoff=0.4) or known[:10]
            hint = f"there are: {', '.join(near)}" if near else "no VM was ever protected into it"
            raise VmStateError(f"{self.url}: holds no VM called {self.name!r}", hint)
        return vm

    def history(self) -> History:
        """Its history, from the repository alone. Raises what keeps that from being read."""
        from vmrewind.history.history import History

        history = History.open(self.name, None, self.repository())
        if history.problem is not None:
            raise history.problem
        return history


def being_made(vm: str, target: str, base_id: str) -> str | None:
    """How much of a base is made by now, in words if that is known; None if it is not being made on this host."""
    try:
        found = begun_base(VmHandle(vm, VmConfig.load_saved(VmPaths(vm).config)).journal, target)
    except (VmrewindError, OSError):
        return None
    return made_words(found[1]) if found is not None and found[0] == base_id else None


def open_vm(argument: str) -> VmHandle:
    """The VM of this host that a TOML file's path or a name means.

    Raises ConfigError for a bad file, UsageError for what cannot be a name or is a repository's VM, VmStateError
    for an unknown one.
    """
    found = open_any(argument)
    if isinstance(found, StoredVm):
        raise UsageError(
            f"{argument}: a VM in a repository, and this command works on a VM of this host",
            "give the VM's name or its TOML file; list, timeline, restore and takeover work on what a repository holds",
        )
    return found


def open_any(argument: str) -> VmHandle | StoredVm:
    """The VM that an argument means, on this host or in a repository; nothing is asked of a repository yet."""
    if (stored := parse_stored(argument)) is not None:
        return stored
    if argument.endswith(".toml") or "/" in argument:
        config = load_toml(Path(argument))
        return VmHandle(config.name, config)
    _check_name(argument)
    return VmHandle(argument, VmConfig.load_saved(VmPaths(argument).config))


def parse_stored(argument: str) -> StoredVm | None:
    """The VM that ``URL/VM`` names, None for an argument that is no such thing. Raises UsageError for a URL without a VM.

    What is behind the last slash is the VM's name as it is, nothing is decoded in it. A path counts if it leads into a repository.
    """
    url, _, name = argument.rpartition("/")
    if _WITH_PLACE.fullmatch(argument):
        if not name or url.endswith(":/") or (url.endswith("://") and not url.startswith("file:")):
            raise UsageError(f"{argument}: names no VM", f"write URL/VM; `vmrewind list {argument}` shows which there are")
        _check_name(name)
        return StoredVm(name, "file:///" if url == "file://" else url)
    if argument.endswith(".toml") or not name or not (Path(url or "/") / REPOSITORY).is_file():
        return None
    _check_name(name)
    return StoredVm(name, url or "/")


def _check_name(name: str) -> None:
    try:
        check_name("VM", name)
    except Invalid as error:
        raise UsageError(str(error), error.hint) from None
