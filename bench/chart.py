"""A run as a picture: one bar per peer and load, as an SVG that needs no library to draw or to show."""

from __future__ import annotations

from html import escape
from typing import Final

from bench.machine import one_line
from bench.peers import PEERS, SUBJECT
from bench.report import rate_text
from bench.run import Cell, Result
from bench.workloads import GROUPS, Workload

_WIDTH: Final = 960
_LABELS: Final = 300
"""Room for the loads' names, left of the bars; pixels, as everything here."""
_BARS: Final = 500
_BAR: Final = 11
_GAP: Final = 12
_COLOURS: Final = {
    "vmrewind": "#0b6e4f",
    "nbdkit": "#9aa5b1",
    "qemu-nbd": "#cbd2d9",
    "qemu-nbd-direct": "#b0bcc8",
    "raw-writeback": "#7b8794",
    "raw-none": "#616e7c",
    "blklogwrites": "#d9a441",
}
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#1f2933}"
    ".small{font-size:10px;fill:#52606d}.group{font-weight:600;font-size:13px}.title{font-weight:600;font-size:16px}"
)


def svg(result: Result) -> str:
    """The chart as an SVG document. Bars are relative to the fastest peer of their load; the figure is the rate per second."""
    parts: list[str] = []
    y = 28
    parts.append(_text(16, y, "Rates by load, each relative to its fastest peer", "title"))
    y += 18
    parts.append(_text(16, y, "vmrewind journals every write; no other server protects anything. " + _when(result), "small"))
    y += 22
    y = _legend(result, parts, y)
    for group, title in GROUPS.items():
        workloads = [w for w in result.settings.workloads if w.group == group]
        if not workloads:
            continue
        y += 24
        parts.append(_text(16, y, title, "group"))
        y += 10
        for workload in workloads:
            y = _rows(result, workload, parts, y)
    height = y + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}">'
    ground = f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>vmrewind benchmark</title><style>{_STYLE}</style>", ground, *parts, "</svg>", ""])


def _when(result: Result) -> str:
    return f"{result.started:%Y-%m-%d}, {one_line(result.machine).split(';')[0]}."


def _order(peers: list[str]) -> list[str]:
    return sorted(peers, key=lambda name: name != SUBJECT)


def _legend(result: Result, parts: list[str], y: int) -> int:
    x = 16
    for peer in _order([name for name in PEERS if any(key[1] == name for key in result.cells)]):
        title = PEERS[peer].title
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{_COLOURS[peer]}"/>')
        parts.append(_text(x + 17, y, title))
        x += 40 + 6 * len(title)
    return y


def _rows(result: Result, workload: Workload, parts: list[str], y: int) -> int:
    cells: list[Cell] = [result.cells[workload.name, peer] for peer in _order(list(PEERS)) if (workload.name, peer) in result.cells]
    fastest = max(cell.rate for cell in cells)
    middle = y + _GAP + len(cells) * _BAR // 2 + 4
    parts.append(_text(_LABELS - 12, middle, workload.title, anchor="end"))
    y += _GAP
    for cell in cells:
        length = max(1, round(_BARS * cell.rate / fastest))
        title = f"{PEERS[cell.peer].title}: {rate_text(cell)}/s"
        parts.append(
            f'<rect x="{_LABELS}" y="{y}" width="{length}" height="{_BAR - 1}" fill="{_COLOURS[cell.peer]}">'
            f"<title>{escape(title)}</title></rect>"
        )
        parts.append(_text(_LABELS + length + 6, y + _BAR - 2, rate_text(cell), "small"))
        y += _BAR
    return y


def _text(x: int, y: int, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'
