"""Names that a guest chose, as they may be shown."""

from __future__ import annotations


def shown(name: bytes) -> str:
    """A name or path for people: what a terminal could take for a command, and what is no text, as escapes."""
    text = name.decode("utf-8", "surrogateescape")
    return "".join(character if character.isprintable() and character != "\\" else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def as_json(name: bytes) -> str:
    """A name for machines: UTF-8, other bytes as surrogates (``os.fsencode`` gives the bytes back)."""
    return name.decode("utf-8", "surrogateescape")
