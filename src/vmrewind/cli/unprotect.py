"""``vmrewind unprotect``: give a libvirt domain its own disks back."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from vmrewind.paths import VmPaths
from vmrewind.start.hook import stop_keeper
from vmrewind.start.images import make_whole
from vmrewind.start.libvirt import DEFAULT_URI, Libvirt
from vmrewind.vmconfig.rewrite import unprotect_domain
from vmrewind.vmconfig.xml import has_protection


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def unprotect(
    domain: Annotated[str, Parameter(help="The domain's name. It must be shut off.")],
    /,
    *,
    connect: Annotated[str, Parameter(help="libvirt's URI.")] = DEFAULT_URI,
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative=())] = False,
) -> None:
    """Take a libvirt domain's protection away: its XML becomes what it was. The history that was recorded stays."""
    with Libvirt(connect) as libvirt:
        found = libvirt.domain(domain)
        xml = found.stored_xml(passwords=True)
        protected = has_protection(xml)
        after = unprotect_domain(xml)
        if protected:
            found.require_stopped()
            stop_keeper(VmPaths(domain))
            journal = after.protection.journal
            make_whole(domain, Path(journal) if journal else VmPaths(domain).default_journal, _say)
            libvirt.define(after.xml)
    if json:
        report = {"domain": domain, "was_protected": protected, "disks": list(after.removed)}
        sys.stdout.write(jsonlib.dumps(report) + "\n")
        return
    console = Console()
    if not protected:
        console.print(f"{domain} is not protected.", markup=False, highlight=False)
        return
    disks = ", ".join(after.removed) or "none"
    console.print(
        f"{domain} is no longer protected; disks put back: {disks}. Its history stays in the repository and in "
        f"{VmPaths(domain).state}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
