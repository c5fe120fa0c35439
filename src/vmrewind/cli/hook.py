"""``vmrewind hook``: what libvirt's hook script does, for trying a step by hand."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from vmrewind.start.hook import handle


def hook(
    domain: Annotated[str, Parameter(help="The domain's name.")],
    operation: Annotated[str, Parameter(help="prepare, start, started, release, migrate, reconnect …")],
    sub_operation: Annotated[str, Parameter(help="begin or end.")] = "",
    _extra: Annotated[str, Parameter(help="Passed by libvirt and not used.", allow_leading_hyphen=True)] = "",
    /,
) -> None:
    """Take a step of a domain's start or stop, as libvirt's hook does. The domain's XML is read from standard input."""
    handle(domain, operation, sub_operation, sys.stdin.buffer.read())
