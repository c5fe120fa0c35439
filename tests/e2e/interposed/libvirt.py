"""libvirt's Python module with something done around one of its calls: for tests, put in its place by ``PYTHONPATH``.

``INTERPOSED`` says what: ``before|during|after CALL ACTION``. ACTION is ``kill``, the end of this process without a word, or a
command of the shell. ``during``: once the file ``INTERPOSED_FILE`` is there while the call is under way.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent)
sys.path = [entry for entry in sys.path if entry != _HERE]
del sys.modules["libvirt"]
_real: Any = importlib.import_module("libvirt")
_when, _call, _action = os.environ["INTERPOSED"].split(" ", 2)


def _act() -> None:
    if _action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    subprocess.run(_action, shell=True, check=True)


def _act_once_there() -> None:
    while not Path(os.environ["INTERPOSED_FILE"]).exists():
        time.sleep(0.001)
    _act()


def _around(method: Any) -> Any:
    def call(*arguments: Any) -> Any:
        if _when == "before":
            _act()
        if _when == "during":
            threading.Thread(target=_act_once_there, daemon=True).start()
        result = method(*arguments)
        if _when == "after":
            _act()
        return result

    return call


for _class in (_real.virDomain, _real.virConnect):
    if hasattr(_class, _call):
        setattr(_class, _call, _around(getattr(_class, _call)))
