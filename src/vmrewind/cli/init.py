"""``vmrewind init``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.errors import UsageError
from vmrewind.repository.repository import Repository
from vmrewind.repository.secret import (
    KEY_FILE,
    Secret,
    at_terminal,
    given_secrets,
    key_file_of,
    new_passphrase,
    secret_of_key_file,
)


def init(
    url: Annotated[str, Parameter(help="A directory (a path or file:///path), or a bucket: s3://BUCKET/PREFIX, gs://…, az://….")],
    /,
    *,
    encrypt: Annotated[
        bool, Parameter(negative="", help="Encrypt all that is stored. The passphrase is asked for, or taken from the environment.")
    ] = False,
    key_file: Annotated[
        Path | None, Parameter(help="Encrypt with this key file instead of a passphrase; it is made if it is not there.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Make a repository: the place that holds bases and shipped history."""
    if key_file is not None and not encrypt:
        raise UsageError("--key-file is of no use without --encrypt", "add --encrypt")
    secret = _secret(url, key_file) if encrypt else None
    repository = Repository.init(url, secret)
    if json:
        print(json_module.dumps({"repository": repository.url, "id": repository.id, "encrypted": repository.encrypted}))
        return
    print(f"repository {repository.url} is ready (id {repository.id}{', encrypted' if secret is not None else ''})")
    if secret is not None:
        print(
            f"It is opened by {secret.origin}. WHOEVER LOSES THIS LOSES ALL THAT IS IN THE REPOSITORY: keep a copy somewhere else."
        )
        if secret.kind == KEY_FILE:
            print(f"Hosts find it as {key_file_of(repository.id)} (mode 600), or by VMREWIND_KEY_FILE.")


def _secret(url: str, key_file: Path | None) -> Secret:
    if key_file is not None:
        return secret_of_key_file(key_file)
    if given := given_secrets():
        return given[0]
    if not at_terminal():
        raise UsageError(
            "no key is given to encrypt with, and nobody is there to be asked",
            "name a --key-file, or give a passphrase by VMREWIND_PASSPHRASE or VMREWIND_PASSPHRASE_FILE",
        )
    return new_passphrase(url)
