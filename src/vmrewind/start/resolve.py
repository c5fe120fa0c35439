"""From a command's VM argument, a TOML file or a name, to everything that the command works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmrewind.capture.dirty import undeclared_gap
from vmrewind.errors import RepositoryError, UsageError, VmStateError
from vmrewind.history.history import History
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository
from vmrewind.vmconfig.model import Invalid, VmConfig, check_name
from vmrewind.vmconfig.toml import load_toml


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
        unreachable: RepositoryError | None = None
        if self.repository_url is not None:
            try:
                repository = Repository.open(self.repository_url).vm(self.name)
            except RepositoryError as error:
                unreachable = error
        gap = undeclared_gap(self.paths.dirty_map)
        history = History.open(self.name, self.journal, repository, bases=self.paths.bases, problem=unreachable)
        # Asked before and after: one that was declared in between is in the records, or not yet.
        history.undeclared = gap or undeclared_gap(self.paths.dirty_map)
        return history


def open_vm(argument: str) -> VmHandle:
    """The VM of a TOML file's path or of a name.

    Raises ConfigError for a bad file, UsageError for what cannot be a name, VmStateError for an unknown one.
    """
    if argument.endswith(".toml") or "/" in argument:
        config = load_toml(Path(argument))
        return VmHandle(config.name, config)
    try:
        check_name("VM", argument)
    except Invalid as error:
        raise UsageError(str(error), error.hint) from None
    return VmHandle(argument, VmConfig.load_saved(VmPaths(argument).config))
