"""A VM's TOML file: what it means, and what each mistake in it is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrewind.errors import ConfigError, CorruptionError, VmStateError
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.toml import Storage, load_toml, peek_storage

WHOLE = """\
name = "web01"
uuid = "512D52E5-1E45-4BDC-B7F3-69E5EFC43AE6"

[qemu]
command = ["qemu-system-x86_64", "-m", "256"]

[protection]
enabled = true
repository = "repo"
ship = "on-demand"
journal = "../journal"
journal_size = "512MiB"
on_journal_full = "block"
on_failure = "start-unprotected"
shutdown_timeout_seconds = 5

[[protection.disk]]
target = "vda"
image = "web01.raw"

[[protection.disk]]
target = "vdb"
image = "/dev/vg0/web01-data"
format = "qcow2"
device = "scsi-hd,serial=x"
"""

SMALL = 'name = "a"\n[protection]\nenabled = true\n[[protection.disk]]\ntarget = "vda"\nimage = "a.raw"\n'


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "vm.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(directory: Path, text: str | bytes) -> ConfigError:
    path = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load_toml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.hint
    return caught.value


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    config = load_toml(write(tmp_path, WHOLE))
    protection = config.protection
    assert (config.name, config.uuid) == ("web01", "512d52e5-1e45-4bdc-b7f3-69e5efc43ae6")
    assert (config.origin, config.source, config.document) == ("toml", str(tmp_path / "vm.toml"), WHOLE)
    assert config.qemu is not None
    assert config.qemu.command == ["qemu-system-x86_64", "-m", "256"]
    assert (protection.enabled, protection.ship, protection.on_journal_full) == (True, "on-demand", "block")
    assert (protection.on_failure, protection.shutdown_timeout_seconds) == ("start-unprotected", 5)
    assert protection.repository == str(tmp_path / "repo")
    assert protection.journal == str(tmp_path.parent / "journal")
    assert protection.journal_size == 512 << 20
    vda, vdb = protection.disk
    assert (vda.target, vda.image, vda.format, vda.device) == (
        "vda",
        str(tmp_path / "web01.raw"),
        "raw",
        "virtio-blk-pci",
    )
    assert (vdb.target, vdb.image, vdb.format, vdb.device) == (
        "vdb",
        "/dev/vg0/web01-data",
        "qcow2",
        "scsi-hd,serial=x",
    )


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    config = load_toml(write(tmp_path, SMALL))
    protection = config.protection
    assert (config.uuid, config.qemu, protection.repository, protection.journal) == (None, None, None, None)
    assert (protection.ship, protection.on_journal_full, protection.on_failure) == ("auto", "drop-history", "abort")
    assert (protection.journal_size, protection.shutdown_timeout_seconds) == (8 << 30, 60)


def test_a_relative_file_name_is_relative_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SMALL)
    monkeypatch.chdir(tmp_path)
    config = load_toml("vm.toml")
    assert config.source == str(tmp_path / "vm.toml")
    assert config.protection.disk[0].image == str(tmp_path / "a.raw")


def test_without_protection_nothing_is_protected(tmp_path: Path) -> None:
    assert not load_toml(write(tmp_path, 'name = "a"\n')).protection.enabled
    assert not load_toml(write(tmp_path, SMALL.replace("true", "false"))).protection.enabled


@pytest.mark.parametrize("repository", ["/r", "file:///r", "/with space/ünïcode"])
def test_repositories_that_stay_as_they_are(tmp_path: Path, repository: str) -> None:
    text = SMALL.replace("enabled = true", f'enabled = true\nrepository = "{repository}"')
    assert load_toml(write(tmp_path, text)).protection.repository == repository


@pytest.mark.parametrize(
    ("written", "size"),
    [('"1MiB"', 1 << 20), ('"8GiB"', 8 << 30), ('"1 TiB"', 1 << 40), ('"2097152B"', 2 << 20), ("4194304", 4 << 20)],
)
def test_sizes(tmp_path: Path, written: str, size: int) -> None:
    path = write(tmp_path, SMALL.replace("enabled = true", f"enabled = true\njournal_size = {written}"))
    assert load_toml(path).protection.journal_size == size
    assert peek_storage(path) == Storage("a", None, size)


@pytest.mark.parametrize(
    ("written", "seconds"), [('"90s"', 90), ('"30m"', 1800), ('"24h"', 86_400), ('"7 d"', 604_800), ("60", 60)]
)
def test_lengths_of_time(tmp_path: Path, written: str, seconds: int) -> None:
    path = write(tmp_path, SMALL.replace("enabled = true", f"enabled = true\nlocal_history = {written}"))
    assert load_toml(path).protection.local_history == seconds
    assert peek_storage(path) == Storage("a", None, 8 << 30, seconds)


def test_a_bandwidth_limit_is_bytes_a_second(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("enabled = true", 'enabled = true\nbandwidth_limit = "20MiB"'))
    assert load_toml(path).protection.bandwidth_limit == 20 << 20


def with_protection(line: str) -> str:
    return SMALL.replace("enabled = true", f"enabled = true\n{line}")


def with_disk(lines: str) -> str:
    return f"{SMALL}\n[[protection.disk]]\n{lines}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # the syntax
        ("name = \n", "line 1, column 8"),
        ('name = "a"\nname = "b"\n', "line 2"),
        ("[protection\n", "line 1"),
        pytest.param("x = " + "[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(f"x = {'9' * 5000}", "not valid TOML", id="digits"),
        (b'name = "\xff"', "byte 8 is not UTF-8"),
        (b"\x00\x01\x02", "not valid TOML"),
        pytest.param(b"#" * (1 << 21), "larger than", id="large"),
        # keys
        ("", "name: this key is missing"),
        (f'nmae = "a"\n{SMALL}', "nmae: this key is not known"),
        (with_protection("journal_sise = 1"), "protection.journal_sise: this key is not known"),
        (with_disk('target = "vdb"\nimgae = "b"'), "protection.disk[1].imgae: this key is not known"),
        (with_disk('target = "vdb"'), "protection.disk[1].image: this key is missing"),
        (SMALL.replace("enabled = true", ""), "protection.enabled: this key is missing"),
        (f"{SMALL}[qemu]\n", "qemu.command: this key is missing"),
        (f'{SMALL}[qemu]\ncommand = ["q"]\nargs = []', "qemu.args: this key is not known"),
        # types
        ("name = 1", "name: expected a text in quotes, got a number"),
        ('name = "a"\nprotection = true', "protection: expected a table, got true or false"),
        (SMALL.replace("true", '"yes"'), "protection.enabled: expected true or false, got a text"),
        (SMALL.replace("true", "1"), "protection.enabled: expected true or false, got a number"),
        (SMALL.replace("[[protection.disk]]", "[protection.disk]"), "protection.disk: expected a list of tables"),
        ('name = "a"\n[protection]\nenabled = true\ndisk = ["vda"]', "protection.disk[0]: expected a table"),
        (SMALL.replace('"a.raw"', "1.5"), "protection.disk[0].image: expected a text in quotes, got a number"),
        (SMALL.replace('"a.raw"', "2026-11-22"), "protection.disk[0].image: expected a text in quotes, got a date"),
        (f'{SMALL}[qemu]\ncommand = "qemu -m 1"', "qemu.command: expected a list, got a text"),
        (f'{SMALL}[qemu]\ncommand = ["q", 1]', "qemu.command[1]: expected a text in quotes, got a number"),
        (with_protection("journal_size = 1.5"), "protection.journal_size: expected a whole number"),
        (with_protection("journal_size = true"), "protection.journal_size: expected a whole number"),
        (with_protection("ship = true"), "protection.ship"),
        # values
        ('name = ""', "name: the value is empty"),
        ('name = "a/b"', "name: 'a/b' cannot be a VM's name"),
        ('name = ".."', "name: '..' cannot be"),
        ('name = "-x"', "name: '-x' cannot be"),
        ('name = "a\\nb"', "control characters"),
        (f'name = "{"ä" * 101}"', "cannot be a VM's name"),
        ('name = "a"\nuuid = "512d52e5"', "uuid: '512d52e5' is not a UUID"),
        (f"{SMALL}[qemu]\ncommand = []", "qemu.command: the command line is empty"),
        (f'{SMALL}[qemu]\ncommand = ["q", "\\u0000"]', "qemu.command[1]"),
        ('name = "a"\n[protection]\nenabled = true', "protection.disk: protection is enabled and no disk is named"),
        (with_disk('target = "vda"\nimage = "b.raw"'), "protection.disk[1].target: the disk 'vda' is named twice"),
        (with_disk('target = "VDB"\nimage = "b.raw"'), "protection.disk[1].target: 'VDB' cannot be"),
        (with_disk('target = "../x"\nimage = "b.raw"'), "protection.disk[1].target"),
        (with_disk(f'target = "{"v" * 32}"\nimage = "b.raw"'), "protection.disk[1].target"),
        (with_disk('target = "vdb"\nimage = "./x/../a.raw"'), "(vdb).image"),
        (with_disk('target = "vdb"\nimage = ""'), "(vdb).image: the value is empty"),
        (with_disk('target = "vdb"\nimage = "b\\u0000"'), "(vdb).image"),
        (with_disk('target = "vdb"\nimage = "b"\nformat = "vmdk"'), "protection.disk[1].format: 'vmdk' is none of"),
        (with_disk('target = "vdb"\nimage = "b"\ndevice = ""'), "(vdb).device: the value is empty"),
        (with_disk('target = "vdb"\nimage = "b"\ndevice = "-device x"'), "(vdb).device"),
        (with_protection('repository = ""'), "protection.repository: the value is empty"),
        (with_protection('repository = "s3://key:pw@bucket/x"'), "holds credentials"),
        (with_protection('repository = "gs://bucket/a/../b"'), "cannot be part of a prefix"),
        (with_protection('repository = "az://x"'), "no container's name"),
        (with_protection('repository = "s3:bucket"'), "not a URL of an object store"),
        (with_protection('repository = "ftp://host/x"'), "ftp:// is no place"),
        (with_protection('repository = "ftp://x"'), "no place for a repository"),
        (with_protection('repository = "file://host/x"'), "protection.repository"),
        (with_protection('ship = "always"'), "protection.ship: 'always' is none of 'auto', 'on-demand'"),
        (with_protection('on_journal_full = "stop"'), "protection.on_journal_full"),
        (with_protection('on_failure = "ignore"'), "protection.on_failure"),
        (with_protection('journal = ""'), "protection.journal: the value is empty"),
        (with_protection('journal_size = "8 parsecs"'), "protection.journal_size: '8 parsecs' is not a size"),
        (with_protection('journal_size = "-1GiB"'), "protection.journal_size"),
        (with_protection("journal_size = 1000"), "protection.journal_size: 1000 bytes"),
        (with_protection('journal_size = "9999999999999TiB"'), "protection.journal_size"),
        (with_protection(f"journal_size = 1{'0' * 30}"), "protection.journal_size"),
        (with_protection('bandwidth_limit = "1KiB"'), "protection.bandwidth_limit: 1024 bytes a second"),
        (with_protection('bandwidth_limit = "fast"'), "protection.bandwidth_limit: 'fast' is not a size"),
        (with_protection('local_history = "a day"'), "protection.local_history: 'a day' is not a length of time"),
        (with_protection("local_history = -1"), "protection.local_history"),
        (with_protection("shutdown_timeout_seconds = -1"), "protection.shutdown_timeout_seconds"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in str(refused(tmp_path, text))


def test_the_nearest_known_key_is_offered(tmp_path: Path) -> None:
    assert refused(tmp_path, with_protection("journal_sise = 1")).hint == "did you mean 'journal_size'?"
    assert "disk, enabled" in refused(tmp_path, with_protection("zzz = 1")).hint
    assert refused(tmp_path, with_protection('ship = "on_demand"')).hint == "did you mean 'on-demand'?"


def test_one_image_under_two_names_is_one_image(tmp_path: Path) -> None:
    (tmp_path / "a.raw").touch()
    (tmp_path / "link.raw").symlink_to("a.raw")
    error = refused(tmp_path, with_disk('target = "vdb"\nimage = "link.raw"'))
    assert "is already the image of disk 'vda'" in str(error)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_toml(tmp_path)


def test_the_early_look(tmp_path: Path) -> None:
    assert peek_storage(write(tmp_path, WHOLE)) == Storage("web01", tmp_path.parent / "journal", 512 << 20)
    assert peek_storage(write(tmp_path, SMALL)) == Storage("a", None, 8 << 30)


@pytest.mark.parametrize(
    "text",
    [
        "",
        'name = "a"',
        'name = "a"\nprotection = 1',
        'name = "a"\n[protection]\nenabled = false',
        "name =",
        "name = 1",
        'name = "../x"',
        b"\xff",
        pytest.param("x = " + "[" * 100_000, id="deep"),
    ],
)
def test_the_early_look_at_rubbish_sees_nothing(tmp_path: Path, text: str | bytes) -> None:
    assert peek_storage(write(tmp_path, text)) is None
    assert peek_storage(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "text",
    [
        'name = "a"\nunknown = 1\n[protection]\nenabled = true\njournal = 1\njournal_size = true',
        'name = "a"\n[protection]\nenabled = true\njournal = ""\njournal_size = "huge"',
        'name = "a"\n[protection]\nenabled = true\njournal = "\\u0000"\njournal_size = -1',
    ],
)
def test_the_early_look_passes_over_mistakes(tmp_path: Path, text: str) -> None:
    assert peek_storage(write(tmp_path, text)) == Storage("a", None, 8 << 30)


def test_saved_and_loaded(tmp_path: Path) -> None:
    config = load_toml(write(tmp_path, WHOLE))
    path = tmp_path / "state" / "vms" / "web01" / "config.json"
    config.save(path)
    assert VmConfig.load_saved(path) == config
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_configuration_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "web01" / "config.json"
    with pytest.raises(VmStateError, match="no VM called 'web01'"):
        VmConfig.load_saved(path)
    load_toml(write(tmp_path, WHOLE)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"{}", whole[:-20], b"\xff" + whole, whole.replace(b'"web01"', b'"../x"'), b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=str(path)):
            VmConfig.load_saved(path)
