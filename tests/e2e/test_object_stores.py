"""The contract with real object stores, and a repository in each; one worker has each server for all its tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.e2e.conftest import Servers
from tests.object_servers import Azurite, Ceph, ObjectServer, Rclone, SeaweedFS
from tests.store_contract import StoreContract
from vmrewind.errors import RepositoryError
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.store import Store

_buckets: dict[ObjectServer, str] = {}
_numbers = itertools.count()


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


@pytest.mark.xdist_group("seaweedfs")
class TestSeaweedFS(Contract):
    KIND = SeaweedFS


@pytest.mark.xdist_group("ceph")
class TestCeph(Contract):
    KIND = Ceph


@pytest.mark.xdist_group("azurite")
class TestAzurite(Contract):
    KIND = Azurite


@pytest.mark.xdist_group("seaweedfs")
def test_a_store_that_ignores_the_condition_is_refused(servers: Servers, at: Callable[[ObjectServer], None]) -> None:
    """rclone's server takes If-None-Match and overwrites all the same."""
    server = servers(Rclone)
    at(server)
    url = server.url("pre")
    with pytest.raises(RepositoryError, match="overwrites an object although it was told not to"):
        Repository.init(url)
    assert list(open_store(url).list("")) == []
