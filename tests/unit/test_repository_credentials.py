"""Where an object store's credentials come from, and which source wins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmrewind.errors import RepositoryError
from vmrewind.repository.address import Address, parse_address
from vmrewind.repository.credentials import plain_http, settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VMREWIND_ENVIRONMENT", str(tmp_path / "environment"))
    (tmp_path / ".aws").mkdir()
    return tmp_path


def environment(home: Path, text: str, mode: int = 0o600) -> None:
    (home / "environment").write_text(text)
    (home / "environment").chmod(mode)


def test_nothing_anywhere_leaves_it_to_the_library() -> None:
    assert settings("s3") == settings("gs") == settings("az") == {}


def test_the_environment_file_stands_in_for_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(
        home, "# of the host\nAWS_ACCESS_KEY_ID=id\nexport AWS_SECRET_ACCESS_KEY='s=x'\n\nAZURE_STORAGE_ACCOUNT_NAME=\"a\"\n"
    )
    assert settings("s3") == {"aws_access_key_id": "id", "aws_secret_access_key": "s=x"}
    assert settings("az") == {"azure_storage_account_name": "a"}
    assert settings("gs") == {}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from the environment")
    assert "aws_access_key_id" not in settings("s3")
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_an_environment_file_for_others_is_refused(home: Path, mode: int) -> None:
    environment(home, "AWS_ACCESS_KEY_ID=id\n", mode)
    with pytest.raises(RepositoryError, match="others than its owner") as caught:
        settings("s3")
    assert "chmod 600" in caught.value.hint


def test_a_mistake_in_a_file_is_named_without_its_content(home: Path) -> None:
    environment(home, "AWS_ACCESS_KEY_ID=id\nthe-secret\n")
    with pytest.raises(RepositoryError, match="environment: line 2 is not NAME=value") as caught:
        settings("s3")
    assert "the-secret" not in str(caught.value)
    (home / "environment").unlink()
    (home / ".aws/credentials").write_text("the-secret\n")
    with pytest.raises(RepositoryError, match="credentials: cannot be read") as caught:
        settings("s3")
    assert "the-secret" not in str(caught.value)


def test_profiles_of_the_aws_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = d\naws_secret_access_key = ds\n[backup]\naws_access_key_id=b\naws_secret_access_key=b%s\n"
    )
    (home / ".aws/config").write_text(
        "[default]\nregion = eu-1\n[profile backup]\nregion=eu-2\nendpoint_url = http://h:1\noutput=json\n"
    )
    assert settings("s3") == {"aws_access_key_id": "d", "aws_secret_access_key": "ds", "aws_region": "eu-1"}
    assert settings("gs") == {}
    monkeypatch.setenv("AWS_PROFILE", "backup")
    found = settings("s3")
    assert found["aws_access_key_id"] == "b" and found["aws_secret_access_key"] == "b%s"
    assert (found["aws_region"], found["aws_endpoint_url"]) == ("eu-2", "http://h:1")
    assert plain_http("s3", found)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-7")
    assert "aws_region" not in settings("s3")


def test_keys_come_from_one_source(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".aws/credentials").write_text(
        "[default]\naws_access_key_id=d\naws_secret_access_key=ds\naws_session_token=t\nregion=eu-1\n"
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "e")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "es")
    assert settings("s3") == {"aws_region": "eu-1"}


def test_a_profile_that_cannot_be_used_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".aws/config").write_text("[profile r]\nrole_arn = arn\nsource_profile = default\n")
    monkeypatch.setenv("AWS_PROFILE", "r")
    with pytest.raises(RepositoryError, match="it gets its keys by role_arn"):
        settings("s3")
    monkeypatch.setenv("AWS_PROFILE", "none")
    with pytest.raises(RepositoryError, match="AWS_PROFILE=none"):
        settings("s3")


def test_plain_http_only_where_the_endpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(plain_http(scheme, {}) for scheme in ("s3", "gs", "az"))
    assert not plain_http("s3", {"aws_endpoint_url": "https://h"})
    assert plain_http("az", {"azure_storage_endpoint": "http://h"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://h")
    assert not plain_http("s3", {"aws_endpoint": "http://h"})
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://h")
    assert plain_http("gs", {})


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://b-1.x", "b-1.x", ""),
        ("s3://bucket/", "bucket", ""),
        ("gs://bucket/a/b_c", "bucket", "a/b_c/"),
        ("az://box/a.b/", "box", "a.b/"),
    ],
)
def test_addresses(url: str, bucket: str, prefix: str) -> None:
    assert parse_address(url) == Address(url[:2], bucket, prefix)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:///x", "no bucket's name"),
        ("s3://", "no bucket's name"),
        ("s3:bucket", "not a URL"),
        ("s3://bucket/a//b", "cannot be part of a prefix"),
        ("s3://bucket/../b", "cannot be part of a prefix"),
        ("s3://bucket/a b", "cannot be part of a prefix"),
    ],
)
def test_what_is_no_address_is_refused(url: str, words: str) -> None:
    with pytest.raises(RepositoryError, match=words):
        parse_address(url)
