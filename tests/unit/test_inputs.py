"""What comes from outside is looked at before it is used: names, URLs, run ids, domain XML, the hook's arguments."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.history_tools import exit_code_of_main
from vmrewind.errors import ConfigError, RepositoryError, UsageError
from vmrewind.repository.opening import open_store
from vmrewind.repository.url import holds_credentials, redacted
from vmrewind.start import hook
from vmrewind.start.environment import without_credentials
from vmrewind.start.keeper import _keep as keep
from vmrewind.start.resolve import open_vm
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.toml import load_toml
from vmrewind.vmconfig.xml import XML_BYTES_MAX, parse_xml

SECRET = "s3cret"
URLS = [
    f"s3://user:{SECRET}@bucket/kvm",
    f"s3://{SECRET}@bucket",
    f"https://u:{SECRET}@host/x",
    f"file://me:{SECRET}@localhost/srv",
    f"az://container/x?sig={SECRET}",
    f"s3://bucket/x#{SECRET}",
    f"gs://u:p@ss:{SECRET}@bucket/x",
    f"S3://user:{SECRET}@bucket\n",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_credentials_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    assert holds_credentials(url)
    assert SECRET not in redacted(url)
    with pytest.raises(RepositoryError) as refused:
        open_store(url, create=True)
    assert SECRET not in f"{refused.value} {refused.value.hint}"
    config = tmp_path / "web01.toml"
    text = url.replace("\n", "\\n")
    config.write_text(f'name = "web01"\n[protection]\nenabled = true\nrepository = "{text}"\n')
    with config.open("a") as file:
        file.write(f'[[protection.disk]]\ntarget = "vda"\nimage = "{tmp_path}/a"\n')
    with pytest.raises(ConfigError, match=r"protection\.repository.*credentials") as refused_config:
        load_toml(config)
    assert SECRET not in f"{refused_config.value} {refused_config.value.hint}"
    domain = (
        '<domain><name>web01</name><metadata><p:protection xmlns:p="urn:vmrewind:protection:1" enabled="yes" repository="URL">'
        '<p:disk target="vda" image="/a"/></p:protection></metadata></domain>'
    )
    with pytest.raises(ConfigError, match="credentials") as refused_domain:
        parse_domain(domain.replace("URL", url).encode())
    assert SECRET not in f"{refused_domain.value} {refused_domain.value.hint}"


def test_a_command_does_not_repeat_a_secret_either() -> None:
    done = vmrewind("init", URLS[0], check=False)
    assert done.returncode == RepositoryError.exit_code
    assert SECRET not in done.stdout + done.stderr
    assert "…@bucket/kvm" in done.stderr


@pytest.mark.parametrize("url", ["/srv/a@b", "/srv/what?", "file:///srv/a%40b", "s3://bucket/prefix", "relative/a:b@c#d"])
def test_other_urls_are_shown_as_they_are(url: str) -> None:
    assert not holds_credentials(url)
    assert redacted(url) == url


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-v", "a\nb", "a\0b", "x" * 300, ""])
def test_a_name_that_leads_elsewhere_is_none(name: str) -> None:
    with pytest.raises(UsageError):
        open_vm(name)
    for step in ("prepare begin", "start begin", "release end"):
        with pytest.raises(ConfigError):
            hook.handle(name, *step.split(), b"<domain/>")


def test_the_hook_takes_no_path_for_a_name(tmp_path: Path) -> None:
    for name in ("../web01", "/etc", "a/b"):
        with pytest.raises(ConfigError, match="cannot be a VM's name"):
            hook.handle(name, "prepare", "begin", b"<domain/>")


def test_a_keeper_keeps_no_other_domain_than_it_was_started_for(tmp_path: Path) -> None:
    document = tmp_path / "domain.xml"
    document.write_text(
        '<domain><name>web02</name><metadata><p:protection xmlns:p="urn:vmrewind:protection:1" enabled="yes"/></metadata></domain>'
    )
    with pytest.raises(ConfigError, match="its XML is of 'web02'"):
        asyncio.run(keep("web01", document, lambda: None))


@pytest.mark.parametrize("run", ["*", "../../other/events/0", "0000000000000000f", "g", "[0-9]"])
def test_a_runs_id_is_no_pattern(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path
) -> None:
    config = tmp_path / "web01.toml"
    config.write_text('name = "web01"\n')
    monkeypatch.setattr(sys, "argv", ["vmrewind", "events", str(config), "--run", run])
    before = os.umask(0o022)
    try:
        assert exit_code_of_main() == UsageError.exit_code
    finally:
        os.umask(before)
    assert "not the beginning of a run's id" in capsys.readouterr().err


def test_a_huge_domain_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    huge = b"<domain><!--" + b"x" * XML_BYTES_MAX + b"--></domain>"
    with pytest.raises(ConfigError, match="bytes"):
        parse_xml(huge)

    class Stdin:
        buffer = io.BytesIO(huge)

    monkeypatch.setattr(sys, "stdin", Stdin)
    before = os.umask(0o022)
    try:
        assert hook.main(["web01", "prepare", "begin", "-"]) == ConfigError.exit_code
    finally:
        os.umask(before)
    assert "bytes" in capsys.readouterr().err


def test_entities_and_the_network_are_off(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for declaration in (
        f'<!DOCTYPE domain [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>',
        '<!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa"><!ENTITY e "&a;&a;&a;&a;">]>',
        '<!DOCTYPE domain SYSTEM "http://192.0.2.1/x.dtd">',
    ):
        with pytest.raises(ConfigError, match="document type"):
            parse_xml(f"{declaration}<domain><name>&e;</name></domain>".encode())


def test_qemu_and_capture_get_no_credentials() -> None:
    kept = {
        "PATH": "/bin",
        "HOME": "/root",
        "DISPLAY": ":0",
        "VMREWIND_STATE_DIR": "/s",
        "XDG_RUNTIME_DIR": "/run/user/0",
        "LANG": "C",
    }
    dropped = dict.fromkeys(
        ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "VMREWIND_PASSPHRASE"],
        SECRET,
    )
    assert without_credentials(kept | dropped | {"my_password": SECRET}) == kept
