"""What the registry holds: personas, their versions, sculpt jobs and the events a watcher sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

Source = Literal["sculpt", "upload", "ready"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]

FINAL_STATUSES: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Persona:
    """A persona as it is served now."""

    id: str
    name: str
    text: str
    system_prompt: str  # the exact text that precedes every chat
    cast: str = "default"
    sparsity: float = 0.25  # asked for; a version holds the actual one
    recovery: str = "none"
    preset: str = "default"
    teacher: str = "base"
    base: str = ""  # fingerprint
    version: int | None = None  # the one being served; None: the unpruned base
    flagged: bool = False  # the text was changed and the mask kept
    deleted: bool = False
    seed: int = 0
    created: str = ""  # RFC 3339, UTC; the registry fills in what is empty
    updated: str = ""


@dataclass(frozen=True, slots=True)
class Version:
    """One published mask of a persona, and the prompt it was learned under."""

    persona_id: str
    number: int  # from 1
    digest: str
    text: str
    system_prompt: str
    prompt_sha256: str
    sparsity: float  # actual
    recovery: str
    kept: int  # neurons a layer
    intermediate_size: int
    bytes: int  # of the mask file
    source: Source
    created: str = ""
    attached: str = ""  # digest of the attached weights, which are of the kind that `recovery` says; empty: none
    attached_bytes: int = 0  # of their file


@dataclass(frozen=True, slots=True)
class Job:
    """A sculpt: queued, running, or ended in one of `FINAL_STATUSES`."""

    id: str
    persona_id: str
    status: JobStatus = "queued"
    stage: str = ""
    completed: int = 0
    total: int = 0
    eta_s: float | None = None
    error: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)  # JSON
    attempts: int = 0  # times a worker has claimed it
    worker: str | None = None
    lease_expires: float | None = None  # seconds since the epoch
    cancel_requested: bool = False
    created: str = ""
    updated: str = ""

    @property
    def is_final(self) -> bool:
        return self.status in FINAL_STATUSES


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `seq` rises over all personas and is never used twice.

    Of a persona: `created`, `updated` {fields}, `published` {version, digest, serving}, `serving` {version,
    digest} (an earlier version again), `deleted`. Of a job: `queued`, `started` {worker, attempts}, `stage`
    and `progress` {stage, completed, total, eta_s, ...}, `cancelling`, and last one of `succeeded`, `failed`
    {error}, `cancelled`. `add_event` takes other types too.
    """

    seq: int
    persona_id: str
    job_id: str | None
    type: str
    data: dict[str, Any]  # JSON
    created: str


def utc_now() -> str:
    """The time as RFC 3339 in UTC with milliseconds, as every record holds it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
