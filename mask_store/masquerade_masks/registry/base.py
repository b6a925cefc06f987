"""The registry's interface: what is acknowledged here survives `kill -9`.

Methods block; an event loop calls them through threads. Every method that changes something is one
transaction with the events it causes, so a reader sees all of it or nothing, and may raise `StorageFull`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from masquerade_masks.registry.records import Event, Job, JobStatus, Persona, Version


class Registry(Protocol):
    """Personas, versions, jobs and events, shared by the server and its workers."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """Release everything held; a call after it is an error."""

    # Personas

    def create_persona(
        self,
        persona: Persona,
        job: Job | None = None,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
    ) -> tuple[Persona, Job | None, bool]:
        """Store a persona and its first job; the last of the three is False where the key was seen before.

        A replay gives the same persona and job as they are now. The id of a deleted persona may be taken
        again: nothing of the former one is seen, and version numbers go on where it ended. Raises
        `PersonaExists`, and `SettingError` for a key that came with another body.
        """

    def get_persona(self, persona_id: str) -> Persona:
        """Raises `PersonaNotFound`, for a deleted one too."""

    def list_personas(self, limit: int = 100, after: str | None = None, cast: str | None = None) -> list[Persona]:
        """Those not deleted, by id, from the first id greater than `after`."""

    def update_persona(self, persona_id: str, **fields: Any) -> Persona:
        """Change fields other than `id`, `version`, `deleted` and the times. Raises `PersonaNotFound`."""

    def delete_persona(self, persona_id: str) -> None:
        """Mark it deleted and cancel its queued and running jobs. Raises `PersonaNotFound`."""

    # Versions

    def add_version(
        self, version: Version, *, serve: bool, job_id: str | None = None, worker: str | None = None
    ) -> Version:
        """Store the next version; with `serve`, the persona takes its prompt and serves it from here on.

        With `job_id` the job must be running, not asked to stop, and held by `worker` (where given), and it
        has succeeded in the same transaction. Raises `PersonaNotFound`, and `JobConflict` where the number is
        not the next or the job is not held any more.
        """

    def next_version(self, persona_id: str) -> int:
        """Raises `PersonaNotFound`."""

    def get_version(self, persona_id: str, number: int) -> Version:
        """Raises `PersonaNotFound`, `VersionNotFound`."""

    def list_versions(self, persona_id: str) -> list[Version]:
        """Oldest first. Raises `PersonaNotFound`."""

    def set_serving(self, persona_id: str, number: int) -> Persona:
        """Serve this version, with its text and prompt. Raises `PersonaNotFound`, `VersionNotFound`."""

    # Jobs

    def create_job(self, job: Job) -> Job:
        """Queue a job.

        Raises `PersonaNotFound`, and `JobConflict` where the persona has one queued, or running and not asked
        to stop.
        """

    def get_job(self, job_id: str) -> Job:
        """Raises `JobNotFound`."""

    def latest_job(self, persona_id: str) -> Job | None:
        """The newest job of the persona."""

    def queue_position(self, job_id: str) -> int:
        """How many jobs are ahead of a queued one, running ones included; 0 for any other.

        Raises `JobNotFound`.
        """

    def claim_job(self, worker: str, lease_s: float) -> Job | None:
        """Take the oldest job that is queued, or running under an expired lease; None where there is none.

        Of several claims at once exactly one gets the job. A job that was asked to stop and whose worker is
        gone becomes cancelled instead.
        """

    def renew_lease(self, job_id: str, worker: str, lease_s: float) -> bool:
        """False where the job was cancelled, asked to stop, deleted, or taken by another worker: stop it."""

    def release_leases(self, worker: str) -> int:
        """Let the jobs of a worker that is known to be dead be claimed at once; how many there were."""

    def report_progress(
        self,
        job_id: str,
        stage: str,
        completed: int,
        total: int,
        eta_s: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Update a running job and add a `stage` or `progress` event; nothing for a job that is not running.

        Raises `JobNotFound`.
        """

    def finish_job(self, job_id: str, status: JobStatus, error: str | None = None, worker: str | None = None) -> Job:
        """End a job with a final status; one that has ended already stays as it is.

        With `worker`, raises `JobConflict` where another holds the job. Raises `JobNotFound`.
        """

    def request_cancel(self, job_id: str) -> Job:
        """A queued job is cancelled at once, a running one is asked to stop. Raises `JobNotFound`."""

    # Events

    def add_event(self, persona_id: str, job_id: str | None, type: str, data: Mapping[str, Any] | None = None) -> Event:
        """Append an event. Numbers that are not finite become null."""

    def events_after(self, persona_id: str, seq: int = 0, limit: int = 1000) -> list[Event]:
        """The events of one persona after `seq`, oldest first."""

    def changes_after(self, seq: int = 0, limit: int = 1000) -> list[Event]:
        """The events of all personas after `seq`, oldest first. None appears later with a smaller `seq`."""

    def last_seq(self) -> int:
        """The newest event's `seq`, 0 where there is none: take it before reading, then follow from it."""
