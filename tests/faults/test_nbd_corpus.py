"""The fuzzer's corpus, without the fuzzer: each input's answers are lawful, the image and history are what they must be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import corpus, negotiation, transmission


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server's limits as the fuzzer sets them, put back afterwards."""
    for module, name, _ in transmission.LIMITS:
        monkeypatch.setattr(module, name, getattr(module, name))
    yield


def test_every_handshake_of_the_corpus_is_answered_as_the_protocol_has_it() -> None:
    inputs = corpus.inputs("negotiation")
    assert len(inputs) > 20
    for data in inputs:
        negotiation.fuzz(data)


def test_every_request_of_the_corpus_is_answered_as_the_protocol_has_it(small_limits: None) -> None:
    inputs = corpus.inputs("transmission")
    assert len(inputs) > 20
    target = transmission.Target(Path(os.environ["VMREWIND_RUNTIME_DIR"]))
    for data in inputs:
        target.fuzz(data)
    target.close()
