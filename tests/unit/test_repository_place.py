"""One place, however its URL is spelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrewind.repository.url import place_of


def test_a_directory_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    monkeypatch.chdir(tmp_path)
    spellings = [
        "a b",
        "./a b/",
        f"{tmp_path}/a b",
        f"{tmp_path}//x/../a b",
        f"file://{tmp_path}/a%20b",
        f"file://localhost{tmp_path}/a%20b/",
        "link",
    ]
    assert {place_of(url) for url in spellings} == {f"{tmp_path}/a b"}


def test_an_object_store_s_prefix_is_one_place() -> None:
    assert place_of("s3://bucket/prefix/") == place_of("s3://bucket/prefix") != place_of("s3://bucket/prefix2")
    assert place_of("s3://bucket") != place_of("gs://bucket")
