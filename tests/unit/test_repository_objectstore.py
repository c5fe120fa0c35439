"""An object store that misbehaves: what is reported, how long it is waited for, and that nothing is lost or overwritten."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.odd_s3 import OddS3, answers, hangs
from vmrewind.errors import RepositoryError, SpaceError
from vmrewind.repository import objectstore
from vmrewind.repository.complaints import range_is_beyond_end, translated
from vmrewind.repository.objectstore import Patience
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.store import AlreadyExists, NotFound, put_verified

URL = "s3://bucket/pre"
PATH = "/bucket/pre/"


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddS3]:
    with OddS3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        monkeypatch.setattr(objectstore, "AT_FIRST", Patience(1, 0.5, 2))
        monkeypatch.setattr(objectstore, "LATER", Patience(1, 1, 2))
        monkeypatch.setattr(objectstore, "_BUSY_SECONDS", 0.01)
        yield server


def test_a_store_that_hangs_is_given_up_in_time(odd: OddS3) -> None:
    store = open_store(URL)
    odd.oddities.append(hangs)
    for operation in (lambda: store.get("k"), lambda: store.put("k", b""), lambda: list(store.list(""))):
        began = time.monotonic()
        with pytest.raises(RepositoryError, match="did not answer in time") as caught:
            operation()
        assert time.monotonic() - began < 5
        assert "s3://bucket/pre: " in str(caught.value) and caught.value.hint


def test_the_deadline_holds_even_if_the_library_waits_for_ever(odd: OddS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "deadline_seconds", 0.5)
    monkeypatch.setattr(objectstore, "AT_FIRST", Patience(3600, 3600, 2))
    odd.oddities.append(hangs)
    began = time.monotonic()
    with pytest.raises(RepositoryError, match="did not answer in time"):
        open_store(URL).get("k")
    assert time.monotonic() - began < 5


def test_patience_grows_with_the_first_answer(odd: OddS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore, "LATER", Patience(2, 0, 0))
    store = open_store(URL)
    with pytest.raises(NotFound):
        store.get("k")
    odd.oddities.append(hangs)
    began = time.monotonic()
    with pytest.raises(RepositoryError):
        store.get("k")
    assert 1.5 < time.monotonic() - began < 8


def test_a_signal_ends_the_wait(odd: OddS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ship's SIGALRM does, so that a hanging store does not hold up the VM's stop."""
    code = (
        "import os, signal, sys\n"
        "from vmrewind.repository.opening import open_store\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print('hangs', flush=True)\n"
        "open_store('s3://bucket/pre').get('k')\n"
    )
    odd.oddities.append(hangs)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + 30
    while not odd.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(30) == 7
    assert time.monotonic() - began < 4
    assert process.stderr.read() == b""
    process.stdout.close()
    process.stderr.close()


def test_a_conflict_without_an_object_is_tried_again(odd: OddS3) -> None:
    odd.oddities.append(answers(409, "ConditionalRequestConflict", method="PUT", times=2))
    open_store(URL).put("k", b"data")
    assert odd.objects == {PATH + "k": b"data"}


def test_a_conflict_for_ever_is_an_error(odd: OddS3) -> None:
    odd.oddities.append(answers(409, "OperationAborted", method="PUT"))
    with pytest.raises(RepositoryError, match="k: the store refuses it because it exists, and then says that there is none"):
        open_store(URL).put("k", b"data")
    assert odd.objects == {}


def test_a_put_that_meets_itself_is_told_by_comparing(odd: OddS3) -> None:
    odd.oddities.append(answers(500, "InternalError", method="PUT", times=1, lands=True))
    store = open_store(URL)
    with pytest.raises(AlreadyExists):
        store.put("k", b"data")
    assert odd.objects == {PATH + "k": b"data"}
    odd.oddities.append(answers(500, "InternalError", method="PUT", times=1, lands=True))
    put_verified(store, "l", b"data")
    with pytest.raises(RepositoryError, match="another content"):
        put_verified(store, "l", b"other")


def test_every_put_to_s3_tells_its_checksum_as_object_lock_wants_it(odd: OddS3) -> None:
    told: list[str] = []

    def listens(_: OddS3, request: http.server.BaseHTTPRequestHandler) -> bool:
        told.append(request.headers["x-amz-checksum-sha256"])
        return False

    odd.oddities.append(listens)
    open_store(URL).put("k", b"data")
    assert told == [base64.b64encode(hashlib.sha256(b"data").digest()).decode()]


def test_a_repository_whose_first_put_met_itself_is_made(odd: OddS3) -> None:
    odd.oddities.append(answers(503, "SlowDown", method="PUT", times=1, lands=True))
    assert Repository.init(URL).id == Repository.open(URL).id


def test_a_store_that_overwrites_is_refused_and_left_empty(odd: OddS3) -> None:
    def ignores_the_condition(store: OddS3, request: object) -> bool:
        del request.headers["If-None-Match"]  # type: ignore[attr-defined]
        return False

    def deletes(store: OddS3, request: object) -> bool:
        if request.command != "DELETE":  # type: ignore[attr-defined]
            return False
        store.objects.pop(request.path_only)  # type: ignore[attr-defined]
        request.answer(204)  # type: ignore[attr-defined]
        return True

    odd.oddities += [ignores_the_condition, deletes]
    with pytest.raises(RepositoryError, match="overwrites an object although it was told not to") as caught:
        Repository.init(URL)
    assert "If-None-Match" in caught.value.hint
    assert odd.objects == {}


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (
            403,
            "SignatureDoesNotMatch",
            RepositoryError,
            "the store refuses (403 Forbidden: SignatureDoesNotMatch: words of the store)",
        ),
        (404, "NoSuchBucket", RepositoryError, "there is no such bucket"),
        (403, "QuotaExceeded", SpaceError, "no space left in the store"),
        (507, "InsufficientStorage", SpaceError, "no space left in the store"),
        (400, "InvalidRequest", RepositoryError, "400 Bad Request: InvalidRequest: words of the store"),
        (500, "InternalError", RepositoryError, "500 Internal Server Error: InternalError: words of the store"),
    ],
)
def test_what_a_store_says_is_passed_on(odd: OddS3, status: int, code: str, kind: type[RepositoryError], words: str) -> None:
    odd.oddities.append(answers(status, code))
    store = open_store(URL)
    for operation in (lambda: store.get("a/k"), lambda: store.put("a/k", b"")):
        with pytest.raises(kind) as caught:
            operation()
        assert str(caught.value).startswith("s3://bucket/pre: a/k cannot be ")
        assert words in str(caught.value)
        assert caught.value.hint
        assert "the-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_range_beyond_the_end_is_told_by_the_status_and_not_by_a_number_in_the_text() -> None:
    said = "Error performing GET http://127.0.0.1:41655/bucket/k in 4.16ms - Server returned non-2xx status code: "
    assert not range_is_beyond_end(RuntimeError(said + "400 Bad Request: <Error/>"))
    assert range_is_beyond_end(RuntimeError(said + "416 Range Not Satisfiable: <Error/>"))


def test_a_store_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RepositoryError, match="nothing listens at the store's address"):
            open_store(URL).get("k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://no-such-host.invalid")
    with pytest.raises(RepositoryError, match="host name is not known"):
        open_store(URL).get("k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:1")
    with pytest.raises(RepositoryError, match="AWS_ENDPOINT_URL: not a URL"):
        open_store(URL)


def test_google_is_asked_for_put_if_absent_in_its_own_words(odd: OddS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = {"gcs_base_url": odd.endpoint, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_BASE_URL", odd.endpoint)
    made = Repository.init("gs://bucket/pre")
    assert Repository.open("gs://bucket/pre").id == made.id
    with pytest.raises(AlreadyExists):
        open_store("gs://bucket/pre").put("repository.json", b"other")
    assert list(odd.objects) == [PATH + "repository.json"]


def test_signatures_in_urls_are_not_repeated(odd: OddS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=the-secret")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", odd.endpoint)
    for oddity in (answers(418, ""), answers(500, "InternalError"), hangs):
        odd.oddities[:] = [oddity]
        store = open_store("az://container/pre")
        for operation in (lambda store=store: store.get("k"), lambda store=store: list(store.list(""))):
            with pytest.raises(RepositoryError) as caught:
                operation()
            assert "the-secret" not in str(caught.value) + caught.value.hint
    assert os.environ["AZURE_STORAGE_SAS_TOKEN"] not in repr(store)
    unheard_of = ValueError("Error performing GET http://h/c/k?sv=1&sig=the-secret in 3ms - HTTP error: of a new kind")
    said = str(translated(unheard_of, "az://c", "k", "read"))
    assert "the-secret" not in said and "of a new kind" in said
