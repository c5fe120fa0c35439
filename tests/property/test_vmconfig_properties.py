"""Whatever is written into a configuration: it is understood as written, or refused with a ConfigError. Nothing else."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from vmrewind.errors import ConfigError
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.domain import parse_domain, peek_storage
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.rewrite import protect_domain, unprotect_domain
from vmrewind.vmconfig.toml import load_toml
from vmrewind.vmconfig.toml import peek_storage as peek_toml

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20)
NAMES = TEXT.filter(lambda name: "/" not in name and name[0] not in ".-")
TARGETS = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
IMAGES = TEXT.map(lambda text: "/images/" + text.replace("/", "_").replace(".", "_"))


@st.composite
def disks(draw: st.DrawFn) -> list[dict[str, str]]:
    targets = draw(st.lists(TARGETS, min_size=1, max_size=3, unique=True))
    images = draw(st.lists(IMAGES, min_size=len(targets), max_size=len(targets), unique=True))
    formats = [draw(st.sampled_from(["raw", "qcow2"])) for _ in targets]
    return [
        {"target": target, "image": image, "format": kind} for target, image, kind in zip(targets, images, formats, strict=True)
    ]


@st.composite
def protections(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        "repository": IMAGES,
        "ship": st.sampled_from(["auto", "on-demand"]),
        "journal": IMAGES,
        "journal_size": st.integers(1 << 20, 1 << 60),
        "bandwidth_limit": st.integers(64 << 10, 1 << 40),
        "local_history": st.integers(0, 10**8),
        "on_journal_full": st.sampled_from(["drop-history", "block"]),
        "on_failure": st.sampled_from(["abort", "start-unprotected"]),
        "shutdown_timeout_seconds": st.integers(0, 86_400),
    }
    return {"enabled": draw(st.booleans()), **draw(st.fixed_dictionaries({}, optional=optional))}


def toml_value(value: object) -> str:
    # a JSON string, number or truth value is a TOML one, but for TOML's wish to have DEL escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def toml_text(name: str, protection: dict[str, Any], disks: list[dict[str, str]]) -> str:
    lines = [f"name = {toml_value(name)}", "[protection]", *(f"{k} = {toml_value(v)}" for k, v in protection.items())]
    for disk in disks:
        lines += ["[[protection.disk]]", *(f"{key} = {toml_value(value)}" for key, value in disk.items())]
    return "\n".join(lines)


def test_toml_is_understood_as_written_and_survives_saving(tmp_path: Path) -> None:
    @given(NAMES, protections(), disks())
    def check(name: str, protection: dict[str, Any], disks: list[dict[str, str]]) -> None:
        path = tmp_path / "vm.toml"
        path.write_text(toml_text(name, protection, disks), encoding="utf-8")
        config = load_toml(path)
        assert config.name == name
        assert {key: getattr(config.protection, key) for key in protection} == protection
        found = [{"target": d.target, "image": d.image, "format": d.format} for d in config.protection.disk]
        assert found == disks
        peeked = peek_toml(path)
        assert (peeked is not None) == config.protection.enabled
        if peeked is not None:
            assert (peeked.name, peeked.journal_size) == (name, config.protection.journal_size)
            assert peeked.local_history == config.protection.local_history
        config.save(tmp_path / "config.json")
        assert VmConfig.load_saved(tmp_path / "config.json") == config

    check()


WORDS = st.sampled_from(
    [
        "name",
        "uuid",
        "qemu",
        "command",
        "protection",
        "enabled",
        "disk",
        "target",
        "image",
        "journal_size",
        "[",
        "]",
        "[[",
        "]]",
        "=",
        ".",
        ",",
        '"',
        "true",
        "1",
        "1.5",
        "{}",
        "{",
        "}",
        "\n",
        '"vda"',
        '"a"',
        "[protection]",
        "[[protection.disk]]",
        "[qemu]",
        "2026-11-22",
        '"""',
        "'",
        "\\u0000",
        "#",
    ]
)


def test_any_text_is_a_configuration_or_an_error(tmp_path: Path) -> None:
    @given(st.one_of(st.lists(WORDS, max_size=40).map(" ".join), st.text(max_size=60)))
    def check(text: str) -> None:
        path = tmp_path / "vm.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        peek_toml(path)
        try:
            load_toml(path)
        except ConfigError as error:
            assert str(path) in str(error)
            assert error.hint

    check()


ATTRIBUTES = st.fixed_dictionaries(
    {},
    optional={
        "cache": st.sampled_from(["none", "writeback"]),
        "io": st.sampled_from(["native", "threads"]),
        "discard": st.sampled_from(["unmap", "ignore"]),
        "error_policy": st.sampled_from(["report", "stop"]),
        "rerror_policy": st.sampled_from(["report", "ignore"]),
    },
)
CHILDREN = st.lists(st.sampled_from(["serial", "boot", "address", "iotune", "alias"]), unique=True)


@st.composite
def domains(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    root = etree.Element("domain", nsmap={"qemu": "urn:qemu"})
    etree.SubElement(root, "name").text = draw(NAMES.map(str.strip).filter(bool).filter(lambda n: n[0] not in ".-"))
    if draw(st.booleans()):
        etree.SubElement(etree.SubElement(root, "metadata"), "{urn:other}x").text = draw(TEXT)
    devices = etree.SubElement(root, "devices")
    chosen = []
    for disk in draw(disks()):
        kind = draw(st.sampled_from(["file", "block"]))
        element = etree.SubElement(devices, "disk", type=kind, device="disk")
        if draw(st.booleans()) or disk["format"] == "qcow2":
            etree.SubElement(element, "driver", {"name": "qemu", "type": disk["format"], **draw(ATTRIBUTES)})
        etree.SubElement(element, "source", {"file" if kind == "file" else "dev": disk["image"]})
        etree.SubElement(element, "target", dev=disk["target"])
        for child in draw(CHILDREN):
            etree.SubElement(element, child).text = draw(TEXT)
        chosen.append(disk["target"])
    return etree.tostring(root), draw(st.permutations(chosen))


@given(domains(), protections(), st.booleans(), st.integers(1, 3))
def test_what_is_protected_and_unprotected_is_as_before(
    generated: tuple[bytes, list[str]], settings: dict[str, Any], reconnect: bool, times: int
) -> None:
    before, targets = generated
    name = etree.fromstring(before).findtext("name")
    assert name is not None
    xml = before
    for _ in range(times):
        after = protect_domain(
            xml,
            targets,
            socket=str(VmPaths(name).nbd_socket),
            reconnect=reconnect,
            changes={"repository": "/r", **settings},
            chain_of=lambda _: [],
        )
        xml = after.xml
    config = parse_domain(xml)
    assert config is not None
    assert config.protection == after.protection
    assert {key: getattr(config.protection, key) for key in settings if key != "enabled"} == {
        key: value for key, value in settings.items() if key != "enabled"
    }
    assert [disk.target for disk in config.protection.disk] == targets
    peeked = peek_storage(xml)
    assert peeked is not None
    journal = config.protection.journal
    assert (peeked.name, peeked.journal_size) == (name, config.protection.journal_size)
    assert peeked.local_history == config.protection.local_history
    assert peeked.journal == (None if journal is None else Path(journal))
    back = unprotect_domain(xml)
    assert set(back.removed) == set(targets)
    assert etree.tostring(etree.fromstring(back.xml), method="c14n") == etree.tostring(etree.fromstring(before), method="c14n")


@given(domains(), st.data())
def test_any_damage_to_a_protected_domain_is_harmless_or_an_error(generated: tuple[bytes, list[str]], data: st.DataObject) -> None:
    before, targets = generated
    xml = protect_domain(before, targets, socket="/s", reconnect=True, changes={"repository": "/r"}, chain_of=lambda _: []).xml
    position = data.draw(st.integers(0, len(xml) - 1))
    length = data.draw(st.integers(0, 20))
    inserted = data.draw(st.one_of(st.binary(max_size=8), st.text(string.printable, max_size=8).map(str.encode)))
    damaged = xml[:position] + inserted + xml[position + length :]
    peek_storage(damaged)
    for attempt in (parse_domain, unprotect_domain):
        try:
            attempt(damaged)
        except ConfigError as error:
            assert error.hint
