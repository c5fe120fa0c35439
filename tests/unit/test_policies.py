"""The AppArmor and SELinux rules in packaging/ compile. They are not tried against a kernel that enforces them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PACKAGING = Path(__file__).parents[2] / "packaging"


def compiled(rules: str, place: Path) -> subprocess.CompletedProcess[str]:
    """What AppArmor's compiler makes of rules inside of a profile; it prints what it understood of each."""
    profile = place / "profile"
    profile.write_text(f"abi <abi/3.0>,\nprofile vmrewind-test {{\n{rules}\n}}\n")
    command = ["apparmor_parser", "-Q", "-K", "--features-file=/etc/apparmor.d/abi/3.0", "-D", "rule-exprs", profile]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_apparmor_rules_compile(tmp_path: Path) -> None:
    for name, path in (("libvirt-qemu", "/run/vmrewind/"), ("usr.sbin.libvirtd", "/opt/python3")):
        done = compiled((PACKAGING / "apparmor" / name).read_text(), tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"aare: {path}" in done.stdout + done.stderr
    assert compiled("/run/vmrewind/** nonsense,", tmp_path).returncode != 0


def test_qemus_rule_is_for_the_socket_alone() -> None:
    rules = [line for line in (PACKAGING / "apparmor" / "libvirt-qemu").read_text().splitlines() if not line.startswith("#")]
    assert rules == ["/run/vmrewind/*/nbd.sock rw,"]


def test_the_selinux_module_compiles(tmp_path: Path) -> None:
    source = PACKAGING / "selinux" / "vmrewind.te"
    done = subprocess.run(
        ["checkmodule", "-M", "-m", "-o", tmp_path / "vmrewind.mod", source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    broken = tmp_path / "vmrewind.te"
    broken.write_text(source.read_text().replace("type virtd_t;", ""))
    done = subprocess.run(["checkmodule", "-M", "-m", "-o", tmp_path / "vmrewind.mod", broken], capture_output=True, check=False)
    assert done.returncode != 0


def test_the_selinux_contexts_are_well_formed() -> None:
    lines = (PACKAGING / "selinux" / "vmrewind.fc").read_text().splitlines()
    wanted = re.compile(r"(/\S+)\(/\.\*\)\?\s+gen_context\(system_u:object_r:\w+_t,s0\)")
    assert [found[1] for line in lines if (found := wanted.fullmatch(line))] == ["/run/vmrewind", "/var/lib/vmrewind"]
