"""An encrypted repository with anything in it damaged, gone, or in another's place: named or not needed, never a wrong byte."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.history_tools import UUID, VM, MadeHistory
from vmrewind.errors import VmrewindError
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.repository import Repository
from vmrewind.repository.secret import secret_of_key_file
from vmrewind.repository.unlocking import add_key, remove_key

DISK = 8192
CONFIG = b'name = "web01"'


class Stored:
    """A VM's history in an encrypted repository, as a host has it that never saw the VM."""

    def __init__(self, directory: Path) -> None:
        self.key_file = directory / "key"
        self.made = made = MadeHistory(directory, {"vda": DISK, "vdb": DISK}, secret=secret_of_key_file(self.key_file))
        made.repository.register(str(UUID))
        made.disk("vda").content[:] = os.urandom(DISK)
        made.disk("vdb").content[:] = os.urandom(DISK)
        made.start()
        middle = 0
        for i in range(6):
            middle = made.write("vda", 100 * i, os.urandom(121))
            made.write("vdb", 50 * i, os.urandom(53))
        made.batch([(fmt.Op.ZERO, "vda", 0, 300), (fmt.Op.WRITE, "vda", 64, b"in one batch")])
        made.stop()
        self.moments = (middle, max(made.times))
        made.ship_runs()
        made.ship(made.run, 1, middle)
        made.ship(made.run, middle + 1, self.moments[1])
        made.repository.put_config(1, "toml", CONFIG)
        self.store = MemoryStore()
        directory_store = DirectoryStore(made.repository_path)
        for key, _ in directory_store.list(""):
            self.store.put(key, directory_store.get(key))

    def read(self) -> dict[str, str]:
        """What went wrong, by what was read; fails if anything that was read is not the truth."""
        wrong: dict[str, str] = {}

        def attempt(what: str, read: Callable[[], None]) -> None:
            try:
                read()
            except VmrewindError as error:
                assert str(error)
                wrong[what] = f"{error} {error.hint}"

        def configuration() -> None:
            vm = Repository.open_in(self.store).vm(VM)
            assert vm.uuid() in (str(UUID), None)
            assert [vm.config(name) for name in vm.configs()] in ([CONFIG], [])

        attempt("configuration", configuration)
        for seq, target in itertools.product(self.moments, ("vda", "vdb")):
            attempt(f"{target} at {seq}", lambda seq=seq, target=target: self._check(seq, target))  # type: ignore[misc]
        return wrong

    def _check(self, seq: int, target: str) -> None:
        with History.open(VM, None, Repository.open_in(self.store).vm(VM)) as history:
            position = resolve(history, history.branch(), f"seq:{seq}", [target], self.made.now_ns)
            view = View.open(history, target, position)
            assert view.read(0, view.size) == self.made.disk(target).states[seq], f"wrong bytes of {target} at seq:{seq}"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    stored = Stored(tmp_path)
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(stored.key_file))
    assert stored.read() == {}
    kinds = {key.split("/")[0 if not key.startswith("vms/") else 2] for key in stored.store.objects}
    assert kinds == {"repository.json", "keys", "chunks", "vm.json", "config", "runs", "bases", "segments"}
    return stored


def places(data: bytes, count: int) -> Iterable[int]:
    return sorted({*range(0, len(data), max(1, len(data) // count)), 0, 8, 16, 48, 63, 64, len(data) - 1})


def test_a_flipped_bit_in_each_kind_of_object_and_each_object_cut(stored: Stored) -> None:
    for key, whole in list(stored.store.objects.items()):
        for at in places(whole, 6):
            for damaged in (whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :], whole[:at]):
                stored.store.objects[key] = damaged
                wrong = stored.read()
                if not key.endswith(".json") or key.startswith("vms/"):  # elsewhere it may be white space
                    assert wrong, (key, at)
                for what, said in wrong.items():
                    assert key in said or "repository.json" in key, (key, what, said)
        stored.store.objects[key] = whole
    assert stored.read() == {}


def test_any_two_objects_swapped_and_any_object_gone(stored: Stored) -> None:
    whole = dict(stored.store.objects)
    for one, other in itertools.combinations(whole, 2):
        stored.store.objects.update({one: whole[other], other: whole[one]})
        wrong = stored.read()
        assert wrong, (one, other)
        for said in wrong.values():
            assert one in said or other in said, (one, other, said)
        stored.store.objects.update(whole)
    for key, content in whole.items():
        del stored.store.objects[key]
        wrong = stored.read()
        assert wrong or "/config/" in key or "/vm.json" in key, key  # which nothing else names
        stored.store.objects[key] = content
    assert stored.read() == {}


def test_verify_reads_what_is_encrypted_and_names_a_damaged_slot_beside_a_whole_one(stored: Stored, tmp_path: Path) -> None:
    url = str(stored.made.repository_path)
    slot_id = add_key(url, secret_of_key_file(tmp_path / "more"))
    done = vmrewind("verify", url, "--data", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    path = stored.made.repository_path / "keys" / f"{slot_id}.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-9])
    done = vmrewind("verify", url, check=False)
    assert done.returncode == 7 and path.name in done.stdout + done.stderr, done.stdout + done.stderr
    remove_key(url, slot_id)
    assert vmrewind("verify", url, check=False).returncode == 0


def test_a_restore_names_damage_and_leaves_no_wrong_image(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, repository = stored.made, stored.made.repository_path
    seq = stored.moments[1]
    number = itertools.count()

    def restored() -> tuple[int, str, Path]:
        output = tmp_path / f"out{next(number)}"
        done = vmrewind("restore", f"{repository}/{VM}", "--at", f"seq:{seq}", "--output", output, "--json", check=False)
        return done.returncode, done.stdout, output

    code, said, output = restored()
    assert code == 0, said
    for target in ("vda", "vdb"):
        assert (output / f"{target}.raw").read_bytes() == made.disk(target).states[seq]
    whole = dict(stored.store.objects)
    wanted = [next(key for key in whole if part in key) for part in ("chunks/", "/bases/", "/runs/", "/segments/", "keys/")]
    for key in wanted:
        path = repository / key
        path.chmod(0o600)
        for damaged in (whole[key][:70] + bytes([whole[key][70] ^ 1]) + whole[key][71:], None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            code, said, output = restored()
            assert code in (5, 6, 7, 8), (key, said)
            assert damaged is None or key in said, (key, said)
            assert list(output.rglob("*.raw")) == [], (key, said)
            path.write_bytes(whole[key])
    # Another key, and none.
    for variable in (str(tmp_path / "other"), ""):
        secret_of_key_file(tmp_path / "other")
        monkeypatch.setenv("VMREWIND_KEY_FILE", variable)
        code, said, output = restored()
        assert (code, json.loads(said)["error"]) == (5, "repository")
        assert ("does not open" if variable else "no key is given") in said
        assert not output.exists()
