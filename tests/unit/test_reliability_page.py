"""docs/reliability.md: each promise names tests, and each test that is named exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "reliability.md"
NAMED = re.compile(r"`((?:unit|property|faults|e2e)/\w+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The table's rows, cell by cell; all tables of the page."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "fault" and set(row[0]) - {"-"}]


def names_of_tests(path: Path) -> set[str]:
    """The names of the tests that pytest finds in a file."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_each_row_has_a_fault_a_promise_and_a_test() -> None:
    found = rows()
    assert len(found) > 20
    assert [row for row in found if len(row) != 3 or not all(row) or not NAMED.search(row[2])] == []


def test_each_test_that_is_named_exists() -> None:
    missing = [
        f"{path}::{name}"
        for row in rows()
        for path, name in NAMED.findall(row[2])
        if not (REPOSITORY / "tests" / path).is_file() or name not in names_of_tests(REPOSITORY / "tests" / path)
    ]
    assert missing == []
