"""A VM's directories, made so that nobody but their owner and QEMU's user gets at what is in them."""

from __future__ import annotations

import os

from vmrewind.errors import ConfigError
from vmrewind.journal.owned import require_own
from vmrewind.journal.runs import private_directory
from vmrewind.paths import VmPaths, runtime_root, state_root


def require_own_places(paths: VmPaths) -> None:
    """Raises ConfigError if another user could change the VM's state, or name processes in its runtime directory."""
    require_own(paths.state, state_root())
    require_own(paths.runtime, runtime_root())


def make_places(paths: VmPaths, owner: tuple[int, int] | None = None) -> None:
    """Make the VM's state and runtime directories. ``owner``: (uid, gid) of a QEMU that runs as another user.

    That QEMU may pass through the runtime directory to its socket, by its group, and see nothing else there. Raises ConfigError.
    """
    require_own_places(paths)
    top = runtime_root()
    try:
        private_directory(paths.state)
        private_directory(top.parent)
        made = not top.is_dir()
        if made:
            top.mkdir(mode=0o700)
        paths.runtime.mkdir(mode=0o700, exist_ok=True)
        # Once more before anything is given away: somebody else may have been quicker.
        require_own_places(paths)
        if made:
            top.chmod(0o711)
        if owner is not None:
            os.chown(paths.runtime, -1, owner[1])
        paths.runtime.chmod(0o700 if owner is None else 0o710)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or paths.runtime}: {error.strerror}",
            "set VMREWIND_STATE_DIR and VMREWIND_RUNTIME_DIR to directories of yours",
        ) from error
