"""Publishing a version: files first, then the registry's row, so that a reader never sees half of one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masquerade_masks import PersonaExists
from masquerade_masks.mask_file import MaskFile
from masquerade_masks.registry import Persona, Version, utc_now

if TYPE_CHECKING:
    from masquerade_masks.registry import Registry, Source
    from masquerade_masks.store import PersonaFiles


@dataclass(frozen=True, slots=True)
class Publication:
    """What becomes a persona's next version."""

    persona_id: str
    text: str
    system_prompt: str  # what it is served with
    mask_file: MaskFile  # its header's persona, version and time are set on publishing
    source: Source
    report: Mapping[str, Any] | None = None
    examples: Path | bytes | None = None  # JSONL


def publish(
    registry: Registry,
    files: PersonaFiles,
    publication: Publication,
    *,
    job_id: str | None = None,
    worker: str | None = None,
) -> Version:
    """Write the files, then add the version and serve it; with `job_id` that job has succeeded.

    Raises `StorageFull` with nothing changed, `PersonaNotFound` for one that was deleted meanwhile,
    `AttachedNotFound` for a mask whose attached weights are not loaded, `JobConflict` where the job is not the worker's
    any more.
    """
    persona_id = publication.persona_id
    number = registry.next_version(persona_id)
    header = replace(publication.mask_file.header, persona=persona_id, version=number, created=utc_now())
    content = MaskFile(publication.mask_file.subnetwork, header)
    files.publish_version(persona_id, number, content, report=publication.report, examples=publication.examples)
    mask, weights = content.subnetwork.mask, content.subnetwork.weights
    version = Version(
        persona_id=persona_id,
        number=number,
        digest=content.subnetwork.digest,
        text=publication.text,
        system_prompt=publication.system_prompt,
        prompt_sha256=header.prompt_sha256,
        sparsity=mask.sparsity,
        recovery=header.recovery,
        kept=mask.kept,
        intermediate_size=mask.intermediate_size,
        bytes=files.mask_path(persona_id, number).stat().st_size,
        source=publication.source,
        created=header.created,
        attached="" if weights is None else weights.digest,
        attached_bytes=0 if weights is None else files.attached_path(persona_id, number, weights.digest).stat().st_size,
    )
    return registry.add_version(version, serve=True, job_id=job_id, worker=worker)


def register(registry: Registry, files: PersonaFiles, publication: Publication, *, name: str, base: str) -> Version:
    """`publish`, for a persona that may not exist yet. Raises what `publish` raises."""
    settings = publication.mask_file.header.settings
    persona = Persona(
        id=publication.persona_id,
        name=name,
        text=publication.text,
        system_prompt=publication.system_prompt,
        sparsity=float(settings.get("sparsity", publication.mask_file.subnetwork.mask.sparsity)),
        recovery=publication.mask_file.header.recovery,
        preset=str(settings.get("preset", "default")),
        seed=int(settings.get("seed", 0)),
        base=base,
    )
    with suppress(PersonaExists):
        registry.create_persona(persona)
    return publish(registry, files, publication)
