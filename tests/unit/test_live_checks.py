"""What is looked at before a running domain is protected, as far as it needs no libvirt."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrewind.errors import ConfigError, ImageError, SpaceError, VmStateError
from vmrewind.journal.runs import DiskInfo, RunInfo, run_path, write_durably
from vmrewind.paths import VmPaths
from vmrewind.start.live import claimed
from vmrewind.start.live_checks import check_history, check_space, storage_of, write_rate
from vmrewind.vmconfig.model import DiskConfig, Protection, VmConfig

UUID = "11111111-2222-4333-8444-555555555555"


def config(image: Path, repository: Path) -> VmConfig:
    protection = Protection(enabled=True, repository=str(repository), disk=[DiskConfig("vda", str(image))])
    return VmConfig(name="web01", uuid=UUID, qemu=None, protection=protection, origin="libvirt", source="web01", document="")


def test_a_saved_state_that_might_not_fit_is_refused(tmp_path: Path) -> None:
    check_space(1 << 20, tmp_path)
    check_space(1 << 60, tmp_path / "libvirt-keeps-it-elsewhere")
    with pytest.raises(SpaceError, match="MiB are free"):
        check_space(1 << 60, tmp_path)


def test_the_rate_is_measured_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    rate = write_rate(2 << 20, tmp_path)
    assert rate is not None and rate > 0
    assert list(tmp_path.iterdir()) == []
    assert write_rate(2 << 20, tmp_path / "absent") is None


@pytest.mark.parametrize(("size", "kind", "error"), [(2 << 20, "raw", ImageError), (1 << 20, "qcow2", ConfigError)])
def test_a_disk_that_is_not_what_its_history_is_of_is_refused(tmp_path: Path, size: int, kind: str, error: type[Exception]) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(1 << 20))
    wanted = config(image, tmp_path / "repository")
    disk = DiskInfo(0, "vda", size, kind, str(image), None)
    info = RunInfo(1, None, "web01", UUID, "here", 1, 1, (disk,), {}, {})
    write_durably(run_path(storage_of(wanted), 1), info.to_json())
    with pytest.raises(error, match="history"):
        check_history(wanted, VmPaths("web01"))


def test_what_is_between_two_moments_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(1 << 20))
    wanted = config(image, tmp_path / "repository")
    write_durably(storage_of(wanted) / "restore-pending.json", b"{}")
    with pytest.raises(VmStateError, match="half restored"):
        check_history(wanted, VmPaths("web01"))


def test_one_such_command_at_a_time() -> None:
    with claimed("web01"), pytest.raises(VmStateError, match="by another command"), claimed("web01"):
        pass
    with claimed("web01"):
        pass
