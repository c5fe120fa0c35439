"""Whom QEMU runs as, and which libvirt is talked to at all."""

from __future__ import annotations

import grp
import pwd
import sys
from pathlib import Path

import pytest

from vmrewind.errors import LibvirtError
from vmrewind.start.libvirt import Libvirt, qemu_owner

NOBODY = pwd.getpwnam("nobody")


@pytest.mark.parametrize(
    ("conf", "owner"),
    [
        ('user = "root"\ngroup = "root"\n', (0, 0)),
        ("user = 'nobody'\n#group = \"root\"\n", (NOBODY.pw_uid, NOBODY.pw_gid)),
        ('  user="+1234" # a comment\n\tgroup = "5678"\n', (1234, 5678)),
        ("user = 1234\ngroup = +5678\n", (1234, 5678)),
        ('user = "nobody"\nuser = "root"\ngroup = "root"\n', (0, 0)),
        ('dynamic_ownership = 1\nsuper_user = "x"\nuser = "root"\ngroup = "root"', (0, 0)),
    ],
)
def test_qemu_conf_says_whom_qemu_runs_as(tmp_path: Path, conf: str, owner: tuple[int, int]) -> None:
    path = tmp_path / "qemu.conf"
    path.write_text(conf)
    assert qemu_owner(path) == owner


def test_otherwise_it_is_the_distributions_choice(tmp_path: Path) -> None:
    (tmp_path / "qemu.conf").write_text('#user = "root"\n')
    expected = ("libvirt-qemu", "libvirt-qemu")  # the tests run on Debian with libvirt installed
    for path in (tmp_path / "qemu.conf", tmp_path / "absent"):
        uid, gid = qemu_owner(path)
        assert (pwd.getpwuid(uid).pw_name, grp.getgrgid(gid).gr_name) == expected


def test_a_user_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "qemu.conf").write_text('user = "no-such-user"\n')
    with pytest.raises(LibvirtError, match="no-such-user"):
        qemu_owner(tmp_path / "qemu.conf")


@pytest.mark.parametrize(
    "uri", ["qemu+ssh://host/system", "qemu://host/system", "qemu:///session", "xen:///system", "test:///default", ""]
)
def test_only_this_hosts_system_libvirt(uri: str) -> None:
    with pytest.raises(LibvirtError, match="only this host's system libvirt"):
        Libvirt(uri)


def test_without_the_module_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(LibvirtError) as caught:
        Libvirt()
    assert "python3-libvirt" in caught.value.hint


def test_without_a_daemon_it_says_so_and_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LibvirtError, match="No such file or directory") as caught:
        Libvirt(f"qemu:///system?socket={tmp_path}/absent&mode=direct")
    assert "libvirtd" in caught.value.hint
    assert capfd.readouterr() == ("", "")
