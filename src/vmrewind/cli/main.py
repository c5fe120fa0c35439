"""The command line: which commands there are, how errors are shown. Each command is a module of its own, imported when it runs."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib.metadata import version

import cyclopts
from rich.console import Console

from vmrewind.errors import SpaceError, UsageError, VmrewindError
from vmrewind.start.environment import guard_files

app = cyclopts.App(
    name="vmrewind",
    help="Continuous data protection for QEMU/KVM virtual machines: every write is kept, any moment can be restored.",
    version=lambda: version("vmrewind"),
)
app.command("vmrewind.cli.init:init", name="init")
app.command("vmrewind.cli.run:run", name="run")
app.command("vmrewind.cli.protect:protect", name="protect")
app.command("vmrewind.cli.unprotect:unprotect", name="unprotect")
app.command("vmrewind.cli.backup:backup", name="backup")
app.command("vmrewind.cli.status:status", name="status")
app.command("vmrewind.cli.list:list_vms", name="list")
app.command("vmrewind.cli.timeline:timeline", name="timeline")
app.command("vmrewind.cli.mark:mark", name="mark")
app.command("vmrewind.cli.events:events", name="events")
app.command("vmrewind.cli.restore:restore", name="restore")
app.command("vmrewind.cli.rewind:rewind", name="rewind")
app.command("vmrewind.cli.takeover:takeover", name="takeover")
app.command("vmrewind.cli.export:export", name="export")
app.command("vmrewind.cli.boot:boot", name="boot")
app.command("vmrewind.cli.bisect:bisect", name="bisect")
app.command("vmrewind.cli.ls:ls", name="ls")
app.command("vmrewind.cli.get:get", name="get")
app.command("vmrewind.cli.diff:diff", name="diff")
app.command("vmrewind.cli.find:find", name="find")
app.command("vmrewind.cli.start_anyway:start_anyway", name="start-anyway")
app.command("vmrewind.cli.verify:verify", name="verify")
app.command("vmrewind.cli.capture:capture", name="capture")
app.command("vmrewind.cli.restart_capture:restart_capture", name="restart-capture")
app.command("vmrewind.cli.hook:hook", name="hook")

ship_app = cyclopts.App(name="ship", help="Switch the carrying of history to the repository on or off.")
ship_app.command("vmrewind.cli.ship:on", name="on")
ship_app.command("vmrewind.cli.ship:off", name="off")
app.command(ship_app)

key_app = cyclopts.App(name="key", help="The keys of an encrypted repository: who can open it.")
key_app.command("vmrewind.cli.key:list_keys", name="list")
key_app.command("vmrewind.cli.key:add", name="add")
key_app.command("vmrewind.cli.key:remove", name="remove")
app.command(key_app)

journal_app = cyclopts.App(name="journal", help="Look into the local journal's files.")
journal_app.command("vmrewind.cli.journal:dump", name="dump")
journal_app.command("vmrewind.cli.journal:verify", name="verify")
app.command(journal_app)


def main() -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 bad usage, others as vmrewind.errors gives them."""
    guard_files()
    arguments = sys.argv[1:]
    try:
        result = app(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        return report(UsageError(_plain(error), "vmrewind COMMAND --help shows how a command is used"), arguments)
    except VmrewindError as error:
        return report(error, arguments)
    except BrokenPipeError:
        # Whoever read our output has had enough of it (| head): not an error, and nothing more may be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return report(_failure(error), arguments)
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def _plain(error: cyclopts.CycloptsError) -> str:
    return " ".join(str(error).split())


def _failure(error: OSError) -> VmrewindError:
    """What the system refused and nobody expected, with the file that it is about where the system tells."""
    name = error.filename2 or error.filename  # of a renaming the new name
    about = f"{name}: " if name is not None else ""
    of = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else VmrewindError
    return of(f"{about}{error.strerror or str(error) or type(error).__name__}", "the kernel's log (dmesg) may tell more")


def report(error: VmrewindError, arguments: list[str]) -> int:
    """Show an error as the user asked for output: text, or one JSON object with ``--json``; returns its exit code."""
    if "--json" in arguments:
        print(json.dumps({"error": error.kind, "message": str(error), "hint": error.hint, "exit_code": error.exit_code}))
        return error.exit_code
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {_escaped(str(error))}")
    if error.hint:
        console.print(f"[bold]  do:[/] {_escaped(error.hint)}")
    return error.exit_code


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    sys.exit(main())
