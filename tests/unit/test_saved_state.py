"""Which saved states are told to fit the disks no more, and what is refused as long as one is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmrewind.errors import StartError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start import saved_state

KIB = 1 << 10


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The domain's saved state: a beginning with its XML, and what was saved."""
    monkeypatch.setattr(saved_state, "SAVED_STATES", tmp_path)
    VmPaths("web01").state.mkdir(parents=True)
    path = tmp_path / "web01.save"
    path.write_bytes(bytes(100 * KIB) + os.urandom(200 * KIB))
    return path


def test_only_what_was_resumed_is_refused_whatever_its_xml_is(state: Path) -> None:
    paths = VmPaths("web01")
    saved_state.refuse_unfit(paths)
    saved_state.note_started(paths)
    saved = state.read_bytes()
    state.unlink()
    saved_state.refuse_unfit(paths)
    # as large as the other, and nobody saw it being made
    state.write_bytes(bytes(100 * KIB) + os.urandom(200 * KIB))
    saved_state.refuse_unfit(paths)
    state.write_bytes(b"other XML".ljust(100 * KIB) + saved[100 * KIB :])
    # a domain that ends beside it makes it no better
    saved_state.note_ended(paths)
    with pytest.raises(VmStateError, match="resumed already"):
        saved_state.refuse_unfit(paths)
    assert "managedsave-remove" in saved_state.words(paths)[0]


def test_a_note_that_cannot_be_read_lets_nothing_be_resumed(state: Path) -> None:
    paths = VmPaths("web01")
    paths.saved_state.write_text("{")
    with pytest.raises(StartError, match="cannot be read"):
        saved_state.refuse_unfit(paths)
    state.unlink()
    saved_state.refuse_unfit(paths)
    with pytest.raises(StartError, match="cannot be read"):
        saved_state.note_changed(paths)
    saved_state.note_started(paths)
    assert not paths.saved_state.exists()


def test_disks_change_only_without_a_saved_state_of_a_domain_that_was_started_here(state: Path) -> None:
    paths = VmPaths("web01")
    saved_state.refuse_change(paths)
    (paths.state / "domain.xml").touch()
    with pytest.raises(VmStateError, match="memory is saved"):
        saved_state.refuse_change(paths)
    state.unlink()
    saved_state.refuse_change(paths)
