"""The run-book's commands are ones that there are, with options that they have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vmrewind.cli.main import app

PAGE = Path(__file__).parents[2] / "docs/disaster-recovery.md"
COMMANDS = sorted(set(re.findall(r"vmrewind (?:[a-z][^`\n]*)", "\n".join(re.findall(r"`+([^`]+)`+", PAGE.read_text())))))


def test_the_page_has_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {"takeover", "run", "list", "timeline", "restore", "start-anyway"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    words = shlex.split(command)[1:]
    if len(words) > 1:
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert bound.arguments
    else:
        assert words[0] in app
