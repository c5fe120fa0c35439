"""The object stores, each started when the first test of a worker wants it; what wants the same one is in one class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.object_servers import Missing, ObjectServer

Servers = Callable[[type[ObjectServer]], ObjectServer]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    running: dict[type[ObjectServer], ObjectServer] = {}

    def serving(kind: type[ObjectServer]) -> ObjectServer:
        if kind not in running:
            running[kind] = server = kind(tmp_path_factory.mktemp(kind.__name__))
            server.start()
        return running[kind]

    def serving_or_skip(kind: type[ObjectServer]) -> ObjectServer:
        try:
            return serving(kind)
        except Missing as missing:
            pytest.skip(f"NOT TESTED: {missing} IS NOT INSTALLED, though script/bootstrap installs it")

    yield serving_or_skip
    for server in running.values():
        server.stop(9)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[ObjectServer], None]:
    """Makes a server the one that this process, and what it starts, finds by the environment."""

    def set_environment(server: ObjectServer) -> None:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

    return set_environment
