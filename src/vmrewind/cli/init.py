"""``vmrewind init``."""

from __future__ import annotations

import json as json_module
from typing import Annotated

from cyclopts import Parameter

from vmrewind.repository.repository import Repository


def init(
    url: Annotated[str, Parameter(help="A directory (a path or file:///path), or a bucket: s3://BUCKET/PREFIX, gs://…, az://….")],
    /,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Make a repository: the place that holds bases and shipped history."""
    repository = Repository.init(url)
    if json:
        print(json_module.dumps({"repository": repository.url, "id": repository.id}))
    else:
        print(f"repository {repository.url} is ready (id {repository.id})")
