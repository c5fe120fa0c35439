"""A host that comes back after another one has taken its VM over: refused, told by whom, and free to go on as a branch."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.e2e.test_start_after import Alone
from tests.odd_s3 import OddS3, hangs
from vmrewind.errors import RepositoryError, SupersededError, by_kind
from vmrewind.history.succession import Successor
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import Position, RunInfo, local_runs, read_head
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository
from vmrewind.start import supersession
from vmrewind.start.supersession import Answer, ask, refuse_superseded


def taken_over(alone: Alone, seq: int, run: int = 1) -> None:
    """Another host takes the VM over as it was after ``seq``."""
    last = local_runs(alone.journal)[-1]
    info = RunInfo(
        last.run + run, Position(last.run, seq, last.start_time_ns), "alone", last.uuid, "hostb", last.start_time_ns + run, seq + 1,
        last.disks, takeover=True,
    )  # fmt: skip
    Repository.open(str(alone.repository)).vm("alone").put_run(info)


def test_a_start_is_refused_names_the_other_host_and_changes_nothing_until_it_is_overruled(tmp_path: Path) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    with alone.serving() as ready:
        alone.write(ready, 1)
    head = read_head(alone.journal)
    assert head is not None
    taken_over(alone, seq=head.position.seq - 2)
    alone.config.write_text(alone.config.read_text().replace("[protection]", '[qemu]\ncommand = ["false"]\n[protection]', 1))
    image = alone.image.read_bytes()
    done = vmrewind("run", alone.config, check=False)
    assert done.returncode == SupersededError.exit_code, done.stderr
    told = " ".join(done.stderr.split())
    assert "host hostb took it over" in told and "2 records of this host lie behind" in told, told
    assert "vmrewind takeover" in told and "start-anyway alone" in told and "--force" in told, told
    assert alone.image.read_bytes() == image and read_head(alone.journal) == head
    assert len(local_runs(alone.journal)) == 1
    assert "hostb" in vmrewind("start-anyway", "alone").stdout
    with alone.serving() as ready:
        alone.write(ready, 2)
        # Its own branch is what it is on, and what it restores.
        assert alone.restored("latest")[:1] == b"\x02"
    assert "nothing to overrule" in vmrewind("start-anyway", "alone").stdout
    taken_over(alone, seq=head.position.seq, run=7)
    assert vmrewind("backup", alone.config, check=False).returncode == SupersededError.exit_code
    forced = vmrewind("run", alone.config, "--force", check=False)
    assert forced.returncode not in (0, SupersededError.exit_code) and "starting it all the same" in forced.stderr


def test_a_repository_that_cannot_be_asked_keeps_no_vm_down(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    alone.repository.rename(tmp_path / "away")
    with alone.serving():
        assert "takeover.unknown" in alone.events()
    (tmp_path / "away").rename(alone.repository)
    taken_over(alone, seq=3)
    (description,) = [path for path in (alone.repository / "vms/alone/runs").iterdir() if "hostb" in path.read_text()]
    description.write_text(description.read_text().replace("hostb", "hostc"))
    with alone.serving():
        assert "takeover.unknown" in alone.events(), "a damaged description tells nothing"


def test_a_repository_that_hangs_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supersession, "LOOK_SECONDS", 0.3)
    with OddS3() as odd:
        odd.oddities.append(hangs)
        for name, value in {"ENDPOINT_URL": odd.endpoint, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "r"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        began = time.monotonic()
        answer = ask("s3://bucket/kvm", "web01", tmp_path)
        assert time.monotonic() - began < 8
    assert answer.repository is None and isinstance(answer.problem, RepositoryError) and "did not answer" in str(answer.problem)
    said: list[str] = []
    log = tmp_path / "log"
    refuse_superseded("web01", answer, tmp_path, VmPaths("web01"), None, said.append, EventLog(log))
    assert "could not be asked" in said[0] and "takeover.unknown" in log.read_text()
    assert threading.active_count() < 20


def test_a_vm_without_a_repository_asks_nobody(tmp_path: Path) -> None:
    refuse_superseded("web01", Answer(None), tmp_path, VmPaths("web01"), None, lambda _: pytest.fail(), EventLog(tmp_path / "log"))
    assert not (tmp_path / "log").exists()


def test_the_refusal_reaches_whoever_starts_a_domain_through_the_hook() -> None:
    """The keeper hands its error to the hook by its kind."""
    who = Successor(5, "hostb", 1, None, None)
    error = supersession.refusal("web01", "/repo/", who)
    rebuilt = by_kind(error.kind, str(error), error.hint)
    assert type(rebuilt) is SupersededError and "takeover /repo/web01" in rebuilt.hint
