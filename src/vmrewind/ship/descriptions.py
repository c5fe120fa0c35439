"""What a reader must know before it can use the records: the VM, its configuration, its runs. It is put before them."""

from __future__ import annotations

import sys
from pathlib import Path

from vmrewind.errors import CorruptionError, VmrewindError
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import RunInfo, described_runs, local_runs, run_path
from vmrewind.repository.repository import VmRepository
from vmrewind.ship.cursor import has_records
from vmrewind.vmconfig.model import VmConfig


class Descriptions:
    """Those of one VM's journal and state directory, and which of them are put."""

    def __init__(self, journal: Path, state: Path) -> None:
        self._journal = journal
        self._state = state
        self._put: set[int] = set()
        self._complaints: set[str] = set()
        self.lost: set[int] = set()
        """Runs whose description is nowhere to be had."""

    def forget(self) -> None:
        """What is put is not known any more."""
        self._put.clear()

    def runs(self, vm: VmRepository) -> list[RunInfo]:
        """The journal's runs; of one whose description is damaged here the repository may have a copy, if it was carried before."""
        damaged: list[CorruptionError] = []
        described = set(described_runs(self._journal))
        found = local_runs(self._journal, damaged.append)
        held = {file.run for file in segment_files(self._journal)}
        # The newest one may be about to begin; of any other a description came before the first record.
        gone = {run for run in held - described if run < max(described, default=0) and has_records(self._journal, run)}
        missing = (described | gone) - {info.run for info in found}
        if not missing:
            self.lost = set()
            return found
        copies = [info for info in vm.runs() if info.run in missing]
        self.lost = missing - {info.run for info in copies}
        for error in damaged if self.lost else ():
            self.complain(f"{error}; a run that is not described cannot be shipped")
        for run in sorted(self.lost & gone):
            self.complain(
                f"{run_path(self._journal, run)} is missing and the journal has records of that run; "
                "a run that is not described cannot be shipped, and its journal is kept as long as there is room"
            )
        return sorted([*found, *copies], key=lambda info: info.run)

    def put(self, vm: VmRepository, runs: tuple[RunInfo, ...]) -> None:
        """Put what is not put yet of ``runs``, and of the VM itself."""
        if runs and not self._put:
            vm.register(runs[-1].uuid)
            self._put_config(vm)
        for info in runs:
            if info.run not in self._put:
                vm.put_run(info)
                self._put.add(info.run)

    def _put_config(self, vm: VmRepository) -> None:
        path = self._state / "config.json"
        try:
            time_ns = path.stat().st_mtime_ns
            config = VmConfig.load_saved(path)
        except FileNotFoundError:
            return
        except VmrewindError as error:
            # The records are worth more than the configuration: they go on without it.
            print(f"ship: the configuration is not shipped: {error}", file=sys.stderr, flush=True)  # noqa: T201
            return
        suffix = "xml" if config.origin == "libvirt" else "toml"
        vm.put_config(time_ns, suffix, config.document.encode())

    def complain(self, what: str) -> None:
        """Once."""
        if what not in self._complaints:
            self._complaints.add(what)
            print(f"ship: {what}", file=sys.stderr, flush=True)  # noqa: T201
