"""How personas, jobs and events read on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masquerade_masks.registry import Event, Job, Persona, Version
    from masquerade_server.catalogue import Serving

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PersonaFacts:
    """Everything about one persona, as of one moment."""

    persona: Persona
    serving: Serving
    versions: Sequence[Version]
    job: Job | None
    queue_position: int  # jobs ahead of a queued one
    residency: str
    report: Json | None = None


def persona_json(facts: PersonaFacts) -> Json:
    """A persona as the API gives it; `warning` says what a developer should know about how it is served."""
    persona, serving = facts.persona, facts.serving
    return {
        "id": persona.id,
        "name": persona.name,
        "text": persona.text,
        "system_prompt": serving.system_prompt,
        "cast": persona.cast,
        "serving": "base" if serving.version is None else "mask",
        "version": persona.version,
        "versions": [version_json(one) for one in facts.versions],
        "job": None if facts.job is None else job_json(facts.job, facts.queue_position),
        "sparsity": persona.sparsity,
        "recovery": persona.recovery,
        "mask": None if serving.version is None else mask_json(serving.version),
        "residency": facts.residency,
        "flagged": persona.flagged,
        "warning": serving.warning,
        "report": facts.report,
        "created": persona.created,
        "updated": persona.updated,
    }


def mask_json(version: Version) -> Json:
    return {
        "digest": version.digest,
        "bytes": version.bytes,
        "kept": version.kept,
        "intermediate_size": version.intermediate_size,
        "attached": attached_json(version),
    }


def attached_json(version: Version) -> Json | None:
    """The weights beside the mask, where there are any."""
    if not version.attached:
        return None
    return {"kind": version.recovery, "digest": version.attached, "bytes": version.attached_bytes}


def version_json(version: Version) -> Json:
    return {
        "number": version.number,
        "text": version.text,
        "sparsity": version.sparsity,
        "recovery": version.recovery,
        "source": version.source,
        "created": version.created,
    } | mask_json(version)


def job_json(job: Job, queue_position: int = 0) -> Json:
    return {
        "id": job.id,
        "status": job.status,
        "stage": job.stage or None,
        "completed": job.completed,
        "total": job.total,
        "eta_s": job.eta_s,
        "error": job.error,
        "queue_position": queue_position,
        "attempts": job.attempts,
        "created": job.created,
        "updated": job.updated,
    }


def event_json(event: Event) -> Json:
    """An event's own data beside what every event has; the latter wins."""
    return dict(event.data) | {
        "id": event.seq,
        "type": event.type,
        "job_id": event.job_id,
        "created": event.created,
    }


def urls(persona_id: str) -> Json:
    """Where to look, to watch and to stop; paths, so that they hold behind any proxy."""
    path = f"/personas/{persona_id}"
    return {"self": path, "events": f"{path}/events", "cancel": f"{path}/cancel"}
