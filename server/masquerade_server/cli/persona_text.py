"""Reading a persona from a text file, and naming it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from masquerade_masks import SettingError
from masquerade_masks.store import check_persona_id
from masquerade_server.identifiers import id_from_name


def read_text(source: str) -> str:
    """The persona's text from a file, or from standard input for `-`. Raises `SettingError`."""
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        text = raw.decode("utf-8-sig").strip()
    except OSError as error:
        raise SettingError("text", f"{source} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingError("text", f"{source} is not UTF-8: byte {error.start} cannot be read") from error
    if not text:
        raise SettingError("text", f"{source} is empty: describe who the persona is and how it speaks")
    return text


def name_of(source: str, name: str | None) -> str:
    """The name that was given, or `swamp-witch.txt` as `Swamp Witch`. Raises `SettingError`."""
    if name is not None and name.strip():
        return name.strip()
    if name is not None:
        raise SettingError("name", "must not be empty")
    if source == "-":
        raise SettingError("name", "is required where the text comes from standard input")
    return re.sub(r"[-_ ]+", " ", Path(source).stem).strip().title()


def id_of(name: str, id: str | None) -> str:
    """The id that was given, or one made from the name. Raises `SettingError`."""
    found = id or id_from_name(name)
    if not found:
        raise SettingError("id", f"cannot be made from the name {name!r}; give one with --id")
    return check_persona_id(found)
