"""What a VM that was begun from another one's moment still lacks: two kinds of small files in its journal's directory.

``filling.json``: the images do not hold all of that moment yet, so nobody may start on them but in front of the process that
completes them, which it names. ``origin-<disk>.json``: the disk's first base, which is that moment, is not in the repository yet,
or never will be. Each is there before the guest's first write, and goes once its subject is durable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrewind.errors import CorruptionError
from vmrewind.journal.content import content
from vmrewind.journal.runs import Position, sync_directory, write_durably

FILLING = "filling.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """The moment that a disk was begun from, and the id of the base that is to be made of it.

    ``vm`` is the other VM as commands take it: a name, or URL/VM. ``lost``: why the base can never be made, empty if it can.
    """

    vm: str
    position: Position
    base: str
    uuid: str
    lost: str = ""

    @staticmethod
    def path(journal: Path, target: str) -> Path:
        """Where that of a disk lies."""
        return journal / f"origin-{target}.json"

    def write(self, journal: Path, target: str) -> None:
        """Note durably that the base of a disk is to be made."""
        plain = asdict(self) | {"position": self.position.as_plain()}
        write_durably(Origin.path(journal, target), json.dumps(plain).encode() + b"\n")

    @classmethod
    def read(cls, journal: Path, target: str) -> Origin | None:
        """That of a disk, None if no base of it is to be made from elsewhere. Raises CorruptionError."""
        path = Origin.path(journal, target)
        try:
            plain = json.loads(content(path))
            position = Position.of_plain(plain["position"])
            return cls(str(plain["vm"]), position, str(plain["base"]), str(plain["uuid"]), str(plain.get("lost", "")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"{path}: cannot be read: {error!r}", "what needs that base is lost; remove the file") from error


def settled(journal: Path, target: str) -> None:
    """The disk's base is in the repository, or another one is in its stead."""
    Origin.path(journal, target).unlink(missing_ok=True)
    sync_directory(journal)


def forget_lost(journal: Path, target: str) -> None:
    """The disk has a base, so it does not matter any more if its first one is lost."""
    if (origin := Origin.read(journal, target)) is not None and origin.lost:
        settled(journal, target)


def note_filling(journal: Path, targets: Sequence[str], by: Mapping[str, int | str]) -> None:
    """Note durably that the images of these disks are not complete. ``by``: the process that completes them, as it names itself."""
    write_durably(journal / FILLING, json.dumps({"disks": list(targets), "by": dict(by)}).encode() + b"\n")


def filling(journal: Path) -> list[str]:
    """The disks whose images are not complete. Raises CorruptionError."""
    return _filling(journal)[0]


def filling_by(journal: Path) -> object:
    """What ``note_filling`` noted of the process, None if there is no such note. Raises CorruptionError."""
    return _filling(journal)[1]


def _filling(journal: Path) -> tuple[list[str], object]:
    try:
        plain = json.loads(content(journal / FILLING))
        return [str(target) for target in plain["disks"]], plain.get("by")
    except (FileNotFoundError, NotADirectoryError):
        return [], None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(
            f"{journal / FILLING}: cannot be read: {error!r}",
            "remove it, and restore all disks in place before anything starts on them: the images hold no moment",
        ) from error


def filled(journal: Path) -> None:
    """The images are complete, and durably so."""
    (journal / FILLING).unlink(missing_ok=True)
    sync_directory(journal)
