"""The registry in one SQLite file: the embedded default."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from masquerade_masks.errors import (
    JobConflict,
    JobNotFound,
    PersonaExists,
    PersonaNotFound,
    SettingError,
    VersionNotFound,
)
from masquerade_masks.registry.connections import Connections
from masquerade_masks.registry.records import (
    FINAL_STATUSES,
    Event,
    Job,
    JobStatus,
    Persona,
    Version,
    utc_now,
)
from masquerade_masks.strict_json import finite

_KEY_LIFETIME_S = 24 * 3600.0  # how long an idempotency key is remembered
_FIXED_FIELDS = frozenset({"id", "version", "deleted", "created", "updated"})
_CHANGEABLE = frozenset(each.name for each in fields(Persona)) - _FIXED_FIELDS


class SQLiteRegistry:
    """`Registry` over SQLite in WAL mode; safe from any number of threads and processes of one machine."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open the file, made and migrated where needed. Raises `SettingError` where it cannot be used.

        `clock` gives seconds since the epoch; leases run by it.
        """
        self._connections = Connections(path)
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connections.close()

    # Personas

    def create_persona(
        self,
        persona: Persona,
        job: Job | None = None,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
    ) -> tuple[Persona, Job | None, bool]:
        assert persona.version is None, "versions come from add_version"
        assert not persona.deleted
        assert job is None or job.persona_id == persona.id, "the job is the persona's own"
        with self._connections.write() as connection:
            if idempotency_key is not None:
                seen = self._seen_before(connection, idempotency_key, body_sha256)
                if seen is not None:
                    return *seen, False
            _make_room(connection, persona.id)
            now = utc_now()
            stored = replace(persona, created=persona.created or now, updated=persona.updated or now)
            _put_persona(connection, stored)
            _emit(connection, persona.id, None, "created")
            stored_job = None if job is None else _put_job(connection, job)
            if idempotency_key is not None:
                job_id = None if job is None else job.id
                row = (idempotency_key, body_sha256, persona.id, job_id, self._clock())
                connection.execute("INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?)", row)
            return stored, stored_job, True

    def get_persona(self, persona_id: str) -> Persona:
        with self._connections.read() as connection:
            return _get_persona(connection, persona_id)

    def list_personas(self, limit: int = 100, after: str | None = None, cast: str | None = None) -> list[Persona]:
        with self._connections.read() as connection:
            rows = connection.execute(
                'SELECT * FROM personas WHERE NOT deleted AND "id" > :after'
                ' AND (:cast IS NULL OR "cast" = :cast) ORDER BY "id" LIMIT :limit',
                {"after": after or "", "cast": cast, "limit": limit},
            )
            return [_as_persona(row) for row in rows]

    def update_persona(self, persona_id: str, **changes: Any) -> Persona:
        if unknown := changes.keys() - _CHANGEABLE:
            raise TypeError(f"not fields of a persona that can be changed: {', '.join(sorted(unknown))}")
        with self._connections.write() as connection:
            changed = replace(_get_persona(connection, persona_id), **changes, updated=utc_now())
            _change_persona(connection, changed)
            _emit(connection, persona_id, None, "updated", {"fields": sorted(changes)})
            return changed

    def delete_persona(self, persona_id: str) -> None:
        with self._connections.write() as connection:
            persona = _get_persona(connection, persona_id)
            for row in connection.execute(
                "SELECT * FROM jobs WHERE persona_id = ? AND status IN ('queued', 'running') ORDER BY position",
                (persona_id,),
            ).fetchall():
                _end_job(connection, _as_job(row), "cancelled")
            _change_persona(connection, replace(persona, deleted=True, updated=utc_now()))
            connection.execute("DELETE FROM idempotency_keys WHERE persona_id = ?", (persona_id,))
            _emit(connection, persona_id, None, "deleted")

    # Versions

    def add_version(
        self, version: Version, *, serve: bool, job_id: str | None = None, worker: str | None = None
    ) -> Version:
        with self._connections.write() as connection:
            persona = _get_persona(connection, version.persona_id)
            job = None if job_id is None else _held_job(connection, job_id, worker)
            expected = _last_version(connection, persona.id) + 1
            if version.number != expected:
                message = f"version {version.number} of {persona.id!r} cannot be added: the next is {expected}"
                raise JobConflict(persona.id, job_id, message)
            stored = replace(version, created=version.created or utc_now())
            _insert(connection, "versions", asdict(stored))
            connection.execute("UPDATE personas SET last_version = ? WHERE id = ?", (version.number, persona.id))
            if serve:
                _change_persona(connection, _serving(persona, stored))
            data = {"version": stored.number, "digest": stored.digest, "serving": serve}
            _emit(connection, persona.id, job_id, "published", data)
            if job is not None:
                _end_job(connection, job, "succeeded")
            return stored

    def next_version(self, persona_id: str) -> int:
        with self._connections.read() as connection:
            _get_persona(connection, persona_id)
            return _last_version(connection, persona_id) + 1

    def get_version(self, persona_id: str, number: int) -> Version:
        with self._connections.read() as connection:
            _get_persona(connection, persona_id)
            return _get_version(connection, persona_id, number)

    def list_versions(self, persona_id: str) -> list[Version]:
        with self._connections.read() as connection:
            _get_persona(connection, persona_id)
            rows = connection.execute("SELECT * FROM versions WHERE persona_id = ? ORDER BY number", (persona_id,))
            return [_as_version(row) for row in rows]

    def set_serving(self, persona_id: str, number: int) -> Persona:
        with self._connections.write() as connection:
            persona = _get_persona(connection, persona_id)
            version = _get_version(connection, persona_id, number)
            changed = _serving(persona, version)
            _change_persona(connection, changed)
            _emit(connection, persona_id, None, "serving", {"version": number, "digest": version.digest})
            return changed

    # Jobs

    def create_job(self, job: Job) -> Job:
        with self._connections.write() as connection:
            _get_persona(connection, job.persona_id)
            active = connection.execute(
                "SELECT id FROM jobs WHERE persona_id = ? AND status IN ('queued', 'running') AND NOT cancel_requested",
                (job.persona_id,),
            ).fetchone()
            if active is not None:
                message = f"persona {job.persona_id!r} is being sculpted by job {active['id']!r}; cancel it first"
                raise JobConflict(job.persona_id, active["id"], message)
            return _put_job(connection, job)

    def get_job(self, job_id: str) -> Job:
        with self._connections.read() as connection:
            return _get_job(connection, job_id)

    def latest_job(self, persona_id: str) -> Job | None:
        with self._connections.read() as connection:
            row = connection.execute(
                "SELECT * FROM jobs WHERE persona_id = ? ORDER BY position DESC LIMIT 1", (persona_id,)
            ).fetchone()
            return None if row is None else _as_job(row)

    def queue_position(self, job_id: str) -> int:
        with self._connections.read() as connection:
            if _get_job(connection, job_id).status != "queued":
                return 0
            row = connection.execute(
                "SELECT count(*) FROM jobs WHERE status = 'running' OR (status = 'queued' AND position <"
                " (SELECT position FROM jobs WHERE id = ?))",
                (job_id,),
            ).fetchone()
            return int(row[0])

    def claim_job(self, worker: str, lease_s: float) -> Job | None:
        with self._connections.read() as connection:  # most polls find nothing: keep them off the write lock
            if self._claimable(connection) is None:
                return None
        with self._connections.write() as connection:
            while (job := self._claimable(connection)) is not None:
                if job.cancel_requested:  # its worker is gone and cannot say so
                    _end_job(connection, job, "cancelled")
                    continue
                claimed = replace(
                    job,
                    status="running",
                    attempts=job.attempts + 1,
                    worker=worker,
                    lease_expires=self._clock() + lease_s,
                    updated=utc_now(),
                )
                _change_job(connection, claimed)
                data = {"worker": worker, "attempts": claimed.attempts}
                _emit(connection, job.persona_id, job.id, "started", data)
                return claimed
            return None

    def renew_lease(self, job_id: str, worker: str, lease_s: float) -> bool:
        with self._connections.write() as connection:
            renewed = connection.execute(
                "UPDATE jobs SET lease_expires = ? WHERE id = ? AND worker = ? AND status = 'running'"
                " AND NOT cancel_requested",
                (self._clock() + lease_s, job_id, worker),
            )
            return renewed.rowcount == 1

    def release_leases(self, worker: str) -> int:
        with self._connections.write() as connection:
            released = connection.execute(
                "UPDATE jobs SET lease_expires = 0 WHERE worker = ? AND status = 'running'", (worker,)
            )
            return released.rowcount

    def report_progress(
        self,
        job_id: str,
        stage: str,
        completed: int,
        total: int,
        eta_s: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        with self._connections.write() as connection:
            job = _get_job(connection, job_id)
            if job.status != "running":
                return
            progress = {"stage": stage, "completed": completed, "total": total, "eta_s": finite(eta_s)}
            _change_job(connection, replace(job, **progress, updated=utc_now()))
            kind = "progress" if stage == job.stage else "stage"
            _emit(connection, job.persona_id, job_id, kind, {**(extra or {}), **progress})

    def finish_job(self, job_id: str, status: JobStatus, error: str | None = None, worker: str | None = None) -> Job:
        assert status in FINAL_STATUSES, status
        with self._connections.write() as connection:
            job = _get_job(connection, job_id)
            if job.is_final:
                return job
            if worker is not None and job.worker != worker:
                raise JobConflict(job.persona_id, job_id, f"job {job_id!r} is held by worker {job.worker!r}")
            return _end_job(connection, job, status, error)

    def request_cancel(self, job_id: str) -> Job:
        with self._connections.write() as connection:
            job = _get_job(connection, job_id)
            if job.is_final or job.cancel_requested:
                return job
            if job.status == "queued":
                return _end_job(connection, job, "cancelled")
            asked = replace(job, cancel_requested=True, updated=utc_now())
            _change_job(connection, asked)
            _emit(connection, job.persona_id, job_id, "cancelling")
            return asked

    # Events

    def add_event(self, persona_id: str, job_id: str | None, type: str, data: Mapping[str, Any] | None = None) -> Event:
        with self._connections.write() as connection:
            return _emit(connection, persona_id, job_id, type, data)

    def events_after(self, persona_id: str, seq: int = 0, limit: int = 1000) -> list[Event]:
        with self._connections.read() as connection:
            rows = connection.execute(
                "SELECT * FROM events WHERE persona_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (persona_id, seq, limit),
            )
            return [_as_event(row) for row in rows]

    def changes_after(self, seq: int = 0, limit: int = 1000) -> list[Event]:
        with self._connections.read() as connection:
            rows = connection.execute("SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))
            return [_as_event(row) for row in rows]

    def last_seq(self) -> int:
        with self._connections.read() as connection:
            return int(connection.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])

    def _seen_before(
        self, connection: sqlite3.Connection, key: str, body_sha256: str | None
    ) -> tuple[Persona, Job | None] | None:
        oldest = self._clock() - _KEY_LIFETIME_S
        connection.execute("DELETE FROM idempotency_keys WHERE created_s < ?", (oldest,))
        row = connection.execute("SELECT * FROM idempotency_keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row["body_sha256"] != body_sha256:
            raise SettingError("Idempotency-Key", f"the key {key!r} was used before with another body")
        job = None if row["job_id"] is None else _get_job(connection, row["job_id"])
        return _get_persona(connection, row["persona_id"]), job

    def _claimable(self, connection: sqlite3.Connection) -> Job | None:
        row = connection.execute(
            "SELECT * FROM jobs WHERE status = 'queued' OR (status = 'running' AND lease_expires <= ?)"
            " ORDER BY position LIMIT 1",
            (self._clock(),),
        ).fetchone()
        return None if row is None else _as_job(row)


def _make_room(connection: sqlite3.Connection, persona_id: str) -> None:
    """Refuse an id in use; clear away what a deleted persona of that id left."""
    row = connection.execute("SELECT deleted FROM personas WHERE id = ?", (persona_id,)).fetchone()
    if row is None:
        return
    if not row["deleted"]:
        raise PersonaExists(persona_id)
    for table in ("versions", "jobs", "events"):
        connection.execute(f"DELETE FROM {table} WHERE persona_id = ?", (persona_id,))


def _put_persona(connection: sqlite3.Connection, persona: Persona) -> None:
    """Insert, or replace a deleted one; `last_version` stays, so no version number is used twice."""
    values = asdict(persona)
    columns = ", ".join(f'"{name}"' for name in values)
    updates = ", ".join(f'"{name}" = excluded."{name}"' for name in values)
    connection.execute(
        f"INSERT INTO personas ({columns}) VALUES ({_marks(values)}) ON CONFLICT (id) DO UPDATE SET {updates}",
        values,
    )


def _change_persona(connection: sqlite3.Connection, persona: Persona) -> None:
    _update(connection, "personas", asdict(persona))


def _serving(persona: Persona, version: Version) -> Persona:
    """A version is served whole: its mask under the prompt it was learned with."""
    return replace(
        persona,
        version=version.number,
        text=version.text,
        system_prompt=version.system_prompt,
        flagged=False,
        updated=utc_now(),
    )


def _put_job(connection: sqlite3.Connection, job: Job) -> Job:
    now = utc_now()
    stored = replace(job, created=job.created or now, updated=job.updated or now)
    try:
        _insert(connection, "jobs", _job_values(stored))
    except sqlite3.IntegrityError as error:
        raise JobConflict(job.persona_id, job.id, f"there is already a job {job.id!r}") from error
    _emit(connection, job.persona_id, job.id, "queued")
    return stored


def _change_job(connection: sqlite3.Connection, job: Job) -> None:
    _update(connection, "jobs", _job_values(job))


def _end_job(connection: sqlite3.Connection, job: Job, status: JobStatus, error: str | None = None) -> Job:
    ended = replace(job, status=status, error=error, eta_s=None, worker=None, lease_expires=None, updated=utc_now())
    _change_job(connection, ended)
    _emit(connection, job.persona_id, job.id, status, {} if error is None else {"error": error})
    return ended


def _held_job(connection: sqlite3.Connection, job_id: str, worker: str | None) -> Job:
    job = _get_job(connection, job_id)
    if job.status != "running" or job.cancel_requested or (worker is not None and job.worker != worker):
        message = f"job {job_id!r} may not publish: it was cancelled, has ended or is held by another worker"
        raise JobConflict(job.persona_id, job_id, message)
    return job


def _emit(
    connection: sqlite3.Connection,
    persona_id: str,
    job_id: str | None,
    type: str,
    data: Mapping[str, Any] | None = None,
) -> Event:
    clean, created = finite(dict(data or {})), utc_now()
    row = (persona_id, job_id, type, json.dumps(clean, ensure_ascii=False), created)
    cursor = connection.execute(
        "INSERT INTO events (persona_id, job_id, type, data, created) VALUES (?, ?, ?, ?, ?)", row
    )
    assert cursor.lastrowid is not None
    return Event(cursor.lastrowid, persona_id, job_id, type, clean, created)


def _get_persona(connection: sqlite3.Connection, persona_id: str) -> Persona:
    row = connection.execute("SELECT * FROM personas WHERE id = ? AND NOT deleted", (persona_id,)).fetchone()
    if row is None:
        raise PersonaNotFound(persona_id)
    return _as_persona(row)


def _last_version(connection: sqlite3.Connection, persona_id: str) -> int:
    row = connection.execute("SELECT last_version FROM personas WHERE id = ?", (persona_id,)).fetchone()
    return int(row["last_version"])


def _get_version(connection: sqlite3.Connection, persona_id: str, number: int) -> Version:
    row = connection.execute(
        "SELECT * FROM versions WHERE persona_id = ? AND number = ?", (persona_id, number)
    ).fetchone()
    if row is None:
        raise VersionNotFound(persona_id, number)
    return _as_version(row)


def _get_job(connection: sqlite3.Connection, job_id: str) -> Job:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise JobNotFound(job_id)
    return _as_job(row)


def _as_persona(row: sqlite3.Row) -> Persona:
    values = {each.name: row[each.name] for each in fields(Persona)}
    return Persona(**values | {"flagged": bool(row["flagged"]), "deleted": bool(row["deleted"])})


def _as_version(row: sqlite3.Row) -> Version:
    return Version(**{each.name: row[each.name] for each in fields(Version)})


def _as_job(row: sqlite3.Row) -> Job:
    values = {each.name: row[each.name] for each in fields(Job)}
    return Job(**values | {"spec": json.loads(row["spec"]), "cancel_requested": bool(row["cancel_requested"])})


def _as_event(row: sqlite3.Row) -> Event:
    return Event(row["seq"], row["persona_id"], row["job_id"], row["type"], json.loads(row["data"]), row["created"])


def _job_values(job: Job) -> dict[str, Any]:
    return asdict(job) | {"spec": json.dumps(job.spec, ensure_ascii=False, allow_nan=False)}


def _insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> None:
    columns = ", ".join(f'"{name}"' for name in values)
    connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({_marks(values)})", dict(values))


def _update(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> None:
    """The row whose `id` is among the values."""
    assignments = ", ".join(f'"{name}" = :{name}' for name in values if name != "id")
    connection.execute(f"UPDATE {table} SET {assignments} WHERE id = :id", dict(values))


def _marks(values: Mapping[str, Any]) -> str:
    return ", ".join(f":{name}" for name in values)
