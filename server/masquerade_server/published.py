"""A persona's published versions, from a data directory or from a running server: what an evaluation looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masquerade_client import Masquerade
from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import MaskError, MaskFile, NoMaskYet, SettingError, VersionNotFound
from masquerade_masks.mask_file import decode
from masquerade_masks.registry import Persona, SQLiteRegistry
from masquerade_masks.store import PersonaFiles

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Published:
    """One version with its prompt, and what is known around it."""

    persona_id: str
    name: str
    version: int
    system_prompt: str
    mask_file: MaskFile
    examples: Path | None = None  # with tokens; a server gives texts alone
    reports: Mapping[int, Json] = field(default_factory=dict)  # the sculpts' own, by version
    others: Mapping[str, MaskFile] = field(default_factory=dict)  # of the cast's other personas, as they serve now


def from_data_dir(data_dir: Path, persona_id: str, version: int | None) -> Published:
    """A version, by default the one that serves.

    Raises `PersonaNotFound`, `VersionNotFound`, `NoMaskYet`, `MaskError`, and `SettingError` without a registry.
    """
    registry_path = data_dir / "registry.sqlite"
    if not registry_path.is_file():
        raise SettingError("data-dir", f"{data_dir} holds no registry; name another, or a server with --url")
    files = PersonaFiles(data_dir)
    with SQLiteRegistry(registry_path) as registry:
        persona = registry.get_persona(persona_id)
        number = persona.version if version is None else version
        if number is None:
            raise NoMaskYet(persona_id)
        chosen = registry.get_version(persona_id, number)
        versions = registry.list_versions(persona_id)
        cast = [one for one in _every(registry, persona.cast) if one.id != persona_id and one.version is not None]
    try:
        examples: Path | None = files.examples_path(persona_id, number)
    except VersionNotFound:
        examples = None
    reports = {one.number: files.read_report(persona_id, one.number) for one in versions}
    return Published(
        persona_id,
        persona.name,
        number,
        chosen.system_prompt,
        files.read_mask(persona_id, number),
        examples,
        {number: report for number, report in reports.items() if report is not None},
        _readable(files, cast),
    )


def from_server(url: str, api_key: str | None, persona_id: str, version: int | None) -> Published:
    """The same, asked of a running server. Raises the client's errors, `NoMaskYet`, `VersionNotFound`, `MaskError`."""
    with Masquerade(url, api_key=api_key) as client:
        persona = client.personas.get(persona_id)
        number = persona.version if version is None else version
        if number is None:
            raise NoMaskYet(persona_id)
        texts = {one.number: one.text for one in persona.versions}
        if number not in texts:
            raise VersionNotFound(persona_id, number)
        found = {one: client.personas.report(persona_id, version=one) for one in texts}
        cast = [one for one in client.personas.list(cast=persona.cast) if one.id != persona_id and one.version]
        return Published(
            persona_id,
            persona.name,
            number,
            persona_system_prompt(persona.name, texts[number] or persona.text),
            decode(client.personas.download_mask(persona_id, version=number)),
            reports={one: dict(report.data) for one, report in found.items() if report is not None},
            others={one.id: decode(client.personas.download_mask(one.id)) for one in cast},
        )


def _every(registry: SQLiteRegistry, cast: str) -> list[Persona]:
    found: list[Persona] = []
    after = None
    while page := registry.list_personas(after=after, cast=cast):
        found += page
        after = page[-1].id
    return found


def _readable(files: PersonaFiles, cast: Sequence[Persona]) -> dict[str, MaskFile]:
    """Those that can be read: another persona's damaged file is no reason not to look at this one."""
    found = {}
    for one in cast:
        try:
            found[one.id] = files.read_mask(one.id, one.version or 0)
        except (MaskError, VersionNotFound, OSError):
            continue
    return found
