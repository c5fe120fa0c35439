"""How a configuration from a repository becomes one of this host, at a takeover: files, and how they are read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmrewind.errors import ConfigError, UsageError, VmrewindError
from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import VmRepository
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.relocate import journal_in, relocate_domain, relocate_toml
from vmrewind.vmconfig.toml import load_toml


def journal_here(repository: VmRepository, paths: VmPaths) -> Path:
    """Where the VM's journal is to be on this host: where it was here before, else where its configuration puts it."""
    try:
        known = VmConfig.load_saved(paths.config).protection.journal
    except VmrewindError:
        names = repository.configs()
        place = journal_in(repository.config(names[-1]), names[-1].suffix) if names else None
        return place or paths.default_journal
    return Path(known) if known else paths.default_journal


@dataclass(frozen=True, slots=True)
class Relocation:
    """Where the VM is to be. ``reconnect``: whether this host's libvirt knows ``<reconnect>``, None if that cannot be told;
    ``domain``: only a libvirt domain will do."""

    repository_url: str
    uuid: str
    paths: VmPaths
    journal: Path
    reconnect: bool | None = None
    domain: bool = False

    def write(self, stored: bytes, suffix: str, images: Mapping[str, Path], directory: Path) -> str:
        """Part of ``Configuring``."""
        if self.domain and suffix != "xml":
            raise UsageError(f"{self.paths.name} is no libvirt domain", "leave --define out: it is started by `vmrewind run`")
        journal = None if self.journal == self.paths.default_journal else self.journal
        if suffix == "xml":
            socket = str(self.paths.nbd_socket)
            data = relocate_domain(stored, images, self.repository_url, journal, socket, reconnect=self.reconnect)
        else:
            data = relocate_toml(stored, images, self.repository_url, self.uuid, journal)
        name = f"{self.paths.name}.{suffix}"
        write_durably(directory / name, data)
        return name

    def load(self, path: Path) -> VmConfig:
        """Part of ``Configuring``."""
        config = parse_domain(path.read_bytes()) if path.suffix == ".xml" else load_toml(path)
        if config is None or not config.protection.enabled:
            raise ConfigError(f"{path}: protection is off", "switch it on, or restore the disks alone")
        return config
