"""The ready personas: masks that ship with the pruner's data, brought into an empty registry once.

Only files of `masquerade_pruner` are read; its code, and torch with it, is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_masks import AttachedNotFound, BaseMismatch, MaskError, PersonaNotFound
from masquerade_masks.mask_file import decode
from masquerade_masks.store import write_json_atomic
from masquerade_server.publishing import Publication, register

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_masks.registry import Registry
    from masquerade_masks.store import PersonaFiles

log = logging.getLogger("masquerade.ready")


@dataclass(frozen=True, slots=True)
class ReadyPersona:
    """One persona that ships with its mask."""

    id: str
    name: str
    text: str
    mask: Path
    report: Path | None

    @property
    def system_prompt(self) -> str:
        """What it is served with."""
        return persona_system_prompt(self.name, self.text)


def pruner_data() -> Path | None:
    """The data folder of `masquerade_pruner`, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec("masquerade_pruner")
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) / "data" if places else None


def shipped(data: Path | None) -> list[ReadyPersona]:
    """The ready personas whose mask file is there."""
    listing = None if data is None else data / "ready.json"
    if data is None or listing is None or not listing.is_file():
        return []
    found = []
    for entry in json.loads(listing.read_text("utf-8")):
        mask, report = (data / "ready" / f"{entry['id']}.{suffix}" for suffix in ("safetensors", "report.json"))
        if mask.is_file():
            one = ReadyPersona(entry["id"], entry["name"], entry["text"], mask, report if report.is_file() else None)
            found.append(one)
    return found


def import_ready(base: Base, registry: Registry, files: PersonaFiles, data_dir: Path, data: Path | None) -> list[str]:
    """Bring in those not brought in before (so a deleted one stays deleted); the ids of the new ones.

    A mask for another base, or a damaged one, is passed over with a line in the log. Raises `StorageFull`.
    """
    record = data_dir / "ready.json"
    known = set(json.loads(record.read_text("utf-8"))) if record.is_file() else set()
    added = [one.id for one in shipped(data) if one.id not in known and _import(one, base, registry, files)]
    if added:
        write_json_atomic(record, sorted(known | set(added)))
    return added


def _import(ready: ReadyPersona, base: Base, registry: Registry, files: PersonaFiles) -> bool:
    try:
        mask_file = decode(ready.mask.read_bytes(), base=base.fingerprint, shape=base.shape)
        if mask_file.subnetwork.attached:  # a mask is all that is shipped
            raise AttachedNotFound(*mask_file.subnetwork.attached[0])
    except BaseMismatch:
        log.info("ready persona %s is not for this base (%s)", ready.id, base.name)
        return False
    except (MaskError, OSError) as error:
        log.warning("ready persona %s cannot be used: %s", ready.id, error)
        return False
    if mask_file.header.prompt_sha256 != prompt_sha256(ready.system_prompt):
        log.warning("ready persona %s was sculpted for another text than the one it ships with", ready.id)
    publication = Publication(ready.id, ready.text, ready.system_prompt, mask_file, "ready", report=_report(ready))
    try:
        present = registry.get_persona(ready.id)
    except PersonaNotFound:
        present = None
    if present is not None and (present.version is not None or present.text != ready.text):
        return True  # a user's own, or imported by a process that was killed before it could note so
    register(registry, files, publication, name=ready.name, base=base.fingerprint)
    log.info("ready persona %s is here", ready.id)
    return True


def _report(ready: ReadyPersona) -> dict[str, Any] | None:
    if ready.report is None:
        return None
    report: dict[str, Any] = json.loads(ready.report.read_text("utf-8"))
    return report
