"""What gives access to a repository: the ecosystems' own environment variables and files, and one file of vmrewind's own.

The library reads the process's environment itself. Added here: ``/etc/vmrewind/environment`` (``KEY=value`` lines, or the file that
``VMREWIND_ENVIRONMENT`` names), since what libvirt starts has next to no environment; and profiles of AWS's files. What is found
goes to the library only, never into this process's environment, which children inherit. The file may hold ``VMREWIND_…`` variables,
too: what gives the key of an encrypted repository (secret.py).
"""

from __future__ import annotations

import configparser
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vmrewind.errors import RepositoryError

ENVIRONMENT_FILE: Final = "/etc/vmrewind/environment"
_PREFIXES: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_ENDPOINTS: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_AWS_FILES: Final = ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
"""Variables that are for this module, not for the library."""
_AWS_OTHER_SOURCES: Final = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_AWS_KEYS: Final = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "region": "AWS_REGION",
    "endpoint_url": "AWS_ENDPOINT_URL",
}
_AWS_UNSUPPORTED: Final = ("credential_process", "sso_session", "sso_start_url", "role_arn")


def settings(scheme: str) -> dict[str, str]:
    """What is to be given to the library besides what it reads from the environment: by variable, in lower case.

    Raises RepositoryError where a file cannot be used.
    """
    prefix = _PREFIXES[scheme]
    known = dict(os.environ)
    added = {name: value for name, value in _environment_file().items() if name.startswith(prefix) and name not in known}
    known |= added
    if scheme == "s3":
        added |= {name: value for name, value in _aws_profile(known).items() if name not in known}
        # The aws command has AWS_DEFAULT_REGION, which the library would put behind a profile's region.
        if "AWS_DEFAULT_REGION" in known:
            added.pop("AWS_REGION", None)
    return {name.lower(): value for name, value in added.items() if name not in _AWS_FILES}


def vmrewind_settings() -> dict[str, str]:
    """Variables of vmrewind's own, from the file and the environment, which goes before. Raises RepositoryError."""
    return {name: value for name, value in (_environment_file() | dict(os.environ)).items() if name.startswith("VMREWIND_")}


def environment_path() -> Path:
    """The file of vmrewind's own, whether or not it is there."""
    return Path(os.environ.get("VMREWIND_ENVIRONMENT") or ENVIRONMENT_FILE)


def plain_http(scheme: str, given: Mapping[str, str]) -> bool:
    """Whether the endpoint is explicitly ``http://``: nothing else permits to go there unencrypted. Raises RepositoryError."""
    for name in _ENDPOINTS[scheme]:
        if endpoint := os.environ.get(name) or given.get(name.lower()):
            if not endpoint.startswith(("http://", "https://")):
                raise RepositoryError(
                    f"{name}: not a URL", "begin it with https:// (or http://, then nothing is encrypted under way)"
                )
            return endpoint.startswith("http://")
    return False


def _environment_file() -> dict[str, str]:
    path = environment_path()
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise RepositoryError(f"{path}: others than its owner may read or write it", f"chmod 600 {path}")
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    except PermissionError:
        return {}  # the host's credentials are not this user's
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path}: cannot be read: {error}", "see docs/repositories.md") from error
    found = {}
    for number, line in enumerate(lines, 1):
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if not name or name.startswith(("#", ";")):
            continue
        if not separator:
            raise RepositoryError(f"{path}: line {number} is not NAME=value", "correct it")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[name.strip()] = value
    return found


def _aws_profile(known: Mapping[str, str]) -> dict[str, str]:
    """What AWS's files say, by variable; of a profile that is not asked for, only where it exists."""
    name = known.get("AWS_PROFILE")
    home = Path(known.get("HOME") or Path.home())
    credentials = Path(known.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws/credentials")
    config = Path(known.get("AWS_CONFIG_FILE") or home / ".aws/config")
    wanted = name or "default"
    found: dict[str, str] = {}
    for path, section in ((config, wanted if wanted == "default" else f"profile {wanted}"), (credentials, wanted)):
        found |= _section(path, section)
    if not found:
        if name:
            raise RepositoryError(f"AWS_PROFILE={name}: neither {credentials} nor {config} has this profile", "correct the name")
        return {}
    has_keys = "AWS_ACCESS_KEY_ID" in known or "aws_access_key_id" in found
    unsupported = next((key for key in _AWS_UNSUPPORTED if key in found), None)
    if not has_keys and unsupported and not any(source in known for source in _AWS_OTHER_SOURCES):
        raise RepositoryError(
            f"profile {wanted} in {config}: it gets its keys by {unsupported}, which vmrewind does not do",
            "give it keys of its own (aws_access_key_id …), or an instance's or web identity's role: docs/repositories.md",
        )
    if "AWS_ACCESS_KEY_ID" in known:
        # Keys come from one source, never half from each.
        for key in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
            found.pop(key, None)
    return {variable: found[key] for key, variable in _AWS_KEYS.items() if key in found}


def _section(path: Path, section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(default_section="\0")
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (FileNotFoundError, PermissionError):
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = str(error).splitlines()[0] if isinstance(error, OSError) else type(error).__name__  # others quote the file's lines
        raise RepositoryError(f"{path}: cannot be read: {reason}", "correct the file") from None
    return dict(parser.items(section)) if parser.has_section(section) else {}
