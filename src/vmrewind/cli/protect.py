"""``vmrewind protect``: put a libvirt domain's disks behind the capture, from its next start on, or as it runs."""

from __future__ import annotations

import json as jsonlib
import re
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from vmrewind.cli.protect_live import disks_of, protect_live
from vmrewind.errors import LibvirtError, UsageError
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository
from vmrewind.start.hook_script import Installed, install, reload_daemons
from vmrewind.start.images import check_image
from vmrewind.start.libvirt import DEFAULT_URI, Libvirt
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.model import FailurePolicy, Invalid, JournalFullPolicy, ShipMode, parse_duration, parse_size
from vmrewind.vmconfig.rewrite import Rewritten, protect_domain
from vmrewind.vmconfig.xml import has_protection


def protect(
    domain: Annotated[str, Parameter(help="The domain's name. It must be shut off, or --live be given.")],
    /,
    *,
    live: Annotated[bool, Parameter(help="Protect the running domain, which stands still for a moment.", negative=())] = False,
    disk: Annotated[list[str] | None, Parameter(help="Target of a disk to protect (vda); may be repeated.", negative=())] = None,
    repository: Annotated[str | None, Parameter(help="Where history is kept: a directory or file:// URL.")] = None,
    ship: Annotated[ShipMode | None, Parameter(help="When records are carried to the repository: always, or on command.")] = None,
    journal: Annotated[Path | None, Parameter(help="Directory of the local journal.")] = None,
    journal_size: Annotated[str | None, Parameter(help="Space for the local journal: 8GiB.")] = None,
    local_history: Annotated[str | None, Parameter(help="How long shipped history stays in the journal: 24h.")] = None,
    bandwidth_limit: Annotated[str | None, Parameter(help="What ship sends at most, a second: 20MiB.")] = None,
    on_journal_full: Annotated[JournalFullPolicy | None, Parameter(help="What gives way when that space is used up.")] = None,
    on_failure: Annotated[FailurePolicy | None, Parameter(help="What a start does that cannot be protected.")] = None,
    connect: Annotated[str, Parameter(help="libvirt's URI.")] = DEFAULT_URI,
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative=())] = False,
) -> None:
    """Protect disks of a libvirt domain from its next start on.

    The domain's XML is rewritten: the disks' sources become vmrewind's socket, their own definitions are kept in the metadata
    for unprotect. Repeating the command adds disks or changes settings; what is not given keeps its value.

    With --live a running domain is protected at once: its memory is saved, and it goes on from there behind the capture. Whatever
    could fail is tried beforehand; what fails all the same leaves the domain running as it was.
    """
    changes = _changes(repository, ship, journal, on_journal_full, on_failure)
    changes |= _quantities(journal_size, bandwidth_limit, local_history)
    if live:
        protect_live(domain, disk or [], changes, connect, json=json)
        return
    paths = VmPaths(domain)
    with Libvirt(connect) as libvirt:
        found = libvirt.domain(domain)
        found.require_stopped("; or protect it as it runs: --live")
        before = found.stored_xml(passwords=True)
        if not disk and not has_protection(before):
            raise UsageError(f"{domain}: no disk is named", "name each disk to protect: --disk vda (virsh domblklist shows them)")
        reconnect = libvirt.knows_reconnect
        after = protect_domain(before, disk or [], socket=str(paths.nbd_socket), reconnect=reconnect, changes=changes)
        assert after.protection.repository is not None
        Repository.open(after.protection.repository)
        for config in after.protection.disk:
            check_image(config)
        hook = install(libvirt.version)
        libvirt.define(after.xml)
        stored = parse_domain(found.stored_xml(passwords=False))
        if stored is None or stored.protection != after.protection:
            libvirt.define(before)
            raise LibvirtError(
                f"domain {domain!r}: libvirt did not keep what was written into its XML; the domain is as it was",
                "report this with the libvirt version (virsh version) and the domain's XML",
            )
        # from now on the name suffices for every command, also before the first start
        stored.save(paths.config)
        snapshots = found.snapshots
        # last: a reload reads every domain's XML again, and what is defined while it runs may be lost
        reloaded = reload_daemons() if hook.fresh else ()
    if json:
        sys.stdout.write(jsonlib.dumps(_report(domain, after, hook, reconnect)) + "\n")
        return
    _tell(Console(), domain, after, hook, reconnect, snapshots)
    if hook.fresh and not reloaded:
        Console().print("  libvirt looks for hooks when it starts: restart its daemon once.", highlight=False)


def _changes(
    repository: str | None,
    ship: ShipMode | None,
    journal: Path | None,
    on_journal_full: JournalFullPolicy | None,
    on_failure: FailurePolicy | None,
) -> dict[str, object]:
    """The fields of Protection that the command line sets."""
    changes: dict[str, object] = {}
    if repository is not None:
        is_url = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|s3:|gs:|az:)", repository)
        changes["repository"] = repository if is_url or not repository else str(Path.cwd() / repository)
    if journal is not None:
        changes["journal"] = str(Path.cwd() / journal)
    if ship is not None:
        changes["ship"] = ship
    if on_journal_full is not None:
        changes["on_journal_full"] = on_journal_full
    if on_failure is not None:
        changes["on_failure"] = on_failure
    return changes


def _quantities(journal_size: str | None, bandwidth_limit: str | None, local_history: str | None) -> dict[str, object]:
    """As ``_changes``, of what has a unit."""
    changes: dict[str, object] = {}
    try:
        if journal_size is not None:
            changes["journal_size"] = parse_size("--journal-size", journal_size)
        if bandwidth_limit is not None:
            changes["bandwidth_limit"] = parse_size("--bandwidth-limit", bandwidth_limit)
        if local_history is not None:
            changes["local_history"] = parse_duration("--local-history", local_history)
    except Invalid as error:
        raise UsageError(f"{error.key}: {error}", error.hint) from None
    return changes


def _report(domain: str, after: Rewritten, hook: Installed, reconnect: bool) -> dict[str, Any]:
    return {
        "domain": domain,
        "disks": disks_of(after),
        "added": list(after.added),
        "repository": after.protection.repository,
        "ship": after.protection.ship,
        "hook": {"path": str(hook.path), "installed": hook.changed},
        "reconnect": reconnect,
    }


def _tell(console: Console, domain: str, after: Rewritten, hook: Installed, reconnect: bool, snapshots: int) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{domain} is protected from its next start on.")
    for disk in after.protection.disk:
        note = "" if disk.target in after.added else " (as before)"
        line(f"  {disk.target}  {disk.image} ({disk.format}){note}")
    line(f"  repository {after.protection.repository}, shipping {after.protection.ship}")
    if hook.changed:
        line(f"Installed libvirt's hook {hook.path}.")
    if not reconnect:
        line("This libvirt is older than 9.2: should the capture die, the VM pauses for a moment until it is back.")
    if snapshots:
        line(f"The domain has {snapshots} snapshots from before: reverting to one brings the unprotected disks back.")
    line(f"Make the full backup now (vmrewind backup {domain}), or the first start begins it, while the VM runs.")
