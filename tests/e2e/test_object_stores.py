"""The contract with real object stores, and a repository in each. A class has its server for all its tests: see conftest.py."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.protected import ProtectedVm, vmrewind
from guests.writer import acknowledged
from tests.e2e.conftest import Servers
from tests.object_servers import Azurite, Ceph, ObjectServer, Rclone, SeaweedFS, signed_s3
from tests.store_contract import StoreContract
from tests.vm_tools import check_files, files_in, restore, writer_vm
from vmrewind.errors import RepositoryError
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.encrypted import EncryptedStore
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.secret import secret_of_key_file
from vmrewind.repository.store import AlreadyExists, Store

_buckets: dict[ObjectServer, str] = {}
_numbers = itertools.count()


def lockable(server: ObjectServer) -> str:
    """A new bucket with versions and a day's retention of every object, which its owner cannot lift."""
    bucket = f"locked{next(_numbers)}"
    assert signed_s3(server.port, "PUT", f"/{bucket}", x_amz_bucket_object_lock_enabled="true")[0] == 200
    rule = b"<Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule>"
    body = b"<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled>%b</ObjectLockConfiguration>" % rule
    assert signed_s3(server.port, "PUT", f"/{bucket}", body, query="object-lock=")[0] == 200
    return f"s3://{bucket}/kvm"


class Contract(StoreContract):
    """``KIND``'s contract; each test has a prefix of its own in one bucket."""

    KIND: type[ObjectServer]

    @pytest.fixture
    def url(self, servers: Servers, at: Callable[[ObjectServer], None]) -> str:
        server = servers(self.KIND)
        at(server)
        bucket = _buckets.get(server) or _buckets.setdefault(server, server.url())
        return f"{bucket}/a/test-{next(_numbers)}"

    @pytest.fixture
    def store(self, url: str) -> Store:
        return open_store(url)

    def test_a_repository_is_made_once_and_opened(self, url: str) -> None:
        made = Repository.init(url)
        made.vm("web 01").register("u")
        assert Repository.open(url).id == made.id
        assert Repository.open(url + "/").vms() == ["web 01"]
        with pytest.raises(RepositoryError, match="there is a repository already"):
            Repository.init(url)


class TestSeaweedFS(Contract):
    KIND = SeaweedFS

    def test_a_bucket_with_object_lock_holds_a_repository(self, servers: Servers, at: Callable[[ObjectServer], None]) -> None:
        server = servers(SeaweedFS)
        at(server)
        url = lockable(server)
        Repository.init(url).vm("web01").register("u")
        assert Repository.open(url).vms() == ["web01"]
        with pytest.raises(AlreadyExists):
            open_store(url).put("repository.json", b"other")

    def test_from_a_guests_writes_to_the_bucket_and_back_through_an_outage(
        self, servers: Servers, at: Callable[[ObjectServer], None], tmp_path: Path
    ) -> None:
        server = servers(SeaweedFS)
        at(server)
        url = server.url("kvm/site-a")
        vmrewind("init", url)
        with writer_vm(tmp_path, "cloud", repository=url, pause_ms=60) as vm:
            vm.start()
            vm.wait_for("^ACK 5$")
            until(lambda: (vm.status()["ship"].get("shipped_seq") or 0) > 20, vm)
            vmrewind("mark", vm.config, "before")
            server.stop(signal.SIGKILL)
            seen = max(acknowledged(vm.console.text()))
            vm.wait_for(f"^ACK {seen + 10}$")
            until(lambda: "s3://" in (vm.status()["ship"].get("error") or ""), vm)
            os.kill(vm.status()["processes"]["ship"]["pid"], signal.SIGKILL)
            server.start()
            until(lambda: (vm.status()["ship"].get("shipped_seq") or 0) > 20, vm)
            before = vm.status()["ship"]
            os.kill(vm.status()["processes"]["ship"]["pid"], signal.SIGKILL)
            until(lambda: newer(vm.status()["ship"], before), vm)
            vm.quit()
        shutil.rmtree(vm.journal)
        assert [key for key, _ in DirectoryStore(vm.repository).list("vms/")] == []
        restore(vm, "latest", tmp_path / "end")
        assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
        restore(vm, "@before", tmp_path / "at")
        found = files_in(tmp_path / "at" / "vda.raw", tmp_path / "files")
        whole = sorted(found)[:-2]
        assert 5 <= len(whole) <= seen
        check_files(found, whole)
        verified = json.loads(vmrewind("verify", url, "--data", "--json").stdout.splitlines()[-1])
        assert (verified["outcome"], verified["findings"]["gap"]) == ("sound", 0)
        timeline = json.loads(vmrewind("timeline", vm.config, "--json").stdout)
        assert "before" in json.dumps(timeline)


class TestSeaweedFSEncrypted(Contract):
    KIND = SeaweedFS

    @pytest.fixture
    def store(self, url: str) -> Store:
        return EncryptedStore(open_store(url), bytes(range(32)))

    def test_a_repository_is_made_once_and_opened(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VMREWIND_KEY_FILE", str(tmp_path / "key"))
        made = Repository.init(url, secret_of_key_file(tmp_path / "key"))
        made.vm("web 01").register("u")
        assert (Repository.open(url).id, Repository.open(url + "/").vm("web 01").uuid()) == (made.id, "u")
        assert b'"u"' not in open_store(url).get("vms/web%2001/vm.json")
        monkeypatch.setenv("VMREWIND_KEY_FILE", "")
        with pytest.raises(RepositoryError, match="no key is given"):
            Repository.open(url)


class TestCeph(Contract):
    KIND = Ceph

    def test_a_bucket_with_versions_in_which_the_gateway_ignores_the_condition_is_refused(
        self, servers: Servers, at: Callable[[ObjectServer], None]
    ) -> None:
        server = servers(Ceph)
        at(server)
        url = lockable(server)
        with pytest.raises(RepositoryError, match="overwrites an object although it was told not to"):
            Repository.init(url)


class TestAzurite(Contract):
    KIND = Azurite


def test_a_store_that_ignores_the_condition_is_refused(servers: Servers, at: Callable[[ObjectServer], None]) -> None:
    """rclone's server takes If-None-Match and overwrites all the same."""
    server = servers(Rclone)
    at(server)
    url = server.url("pre")
    with pytest.raises(RepositoryError, match="overwrites an object although it was told not to"):
        Repository.init(url)
    assert list(open_store(url).list("")) == []


def newer(ship: dict[str, Any], before: dict[str, Any]) -> bool:
    return ship.get("pid") != before.get("pid") and (ship.get("shipped_seq") or 0) > (before.get("shipped_seq") or 0)


def until(condition: Callable[[], bool], vm: ProtectedVm) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, vm.status()
        time.sleep(0.05)
