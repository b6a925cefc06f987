from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from masquerade_masks import (
    Job,
    JobConflict,
    JobNotFound,
    Persona,
    PersonaExists,
    PersonaNotFound,
    Registry,
    SettingError,
    SQLiteRegistry,
    StorageFull,
    Version,
    VersionNotFound,
)
from masquerade_masks.registry import connections
from masquerade_masks.registry.schema import MIGRATIONS


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    with SQLiteRegistry(tmp_path / "registry.db", clock=clock) as opened:
        yield opened


def persona(persona_id: str = "inn", **fields: Any) -> Persona:
    return Persona(persona_id, "The innkeeper", "Gruff but kind.", "You are the innkeeper.", **fields)


def job(job_id: str = "j1", persona_id: str = "inn", **fields: Any) -> Job:
    return Job(job_id, persona_id, spec={"preset": "smoke", "note": "Ærø"}, **fields)


def version(number: int, persona_id: str = "inn", **fields: Any) -> Version:
    return Version(
        persona_id=persona_id,
        number=number,
        digest=f"{number:064x}",
        text=f"Text {number}.",
        system_prompt=f"Prompt {number}.",
        prompt_sha256="cd" * 32,
        sparsity=0.25,
        recovery="none",
        kept=1152,
        intermediate_size=1536,
        bytes=6900,
        source="sculpt",
        **fields,
    )


def types(registry: Registry, persona_id: str = "inn", seq: int = 0) -> list[str]:
    return [event.type for event in registry.events_after(persona_id, seq)]


# Personas


def test_a_persona_and_its_job_are_read_back(registry: Registry) -> None:
    stored, queued, is_new = registry.create_persona(persona(cast="village", seed=7, base="ab" * 32), job())
    assert is_new
    assert stored == registry.get_persona("inn")
    assert queued == registry.get_job("j1") == registry.latest_job("inn")
    assert queued is not None
    assert (stored.cast, stored.seed, stored.version, stored.flagged) == ("village", 7, None, False)
    assert (queued.status, queued.spec, queued.attempts) == ("queued", {"preset": "smoke", "note": "Ærø"}, 0)
    assert stored.created.endswith("Z")
    assert types(registry) == ["created", "queued"]


def test_times_that_were_given_are_kept(registry: Registry) -> None:
    stored, _, _ = registry.create_persona(persona(created="2026-01-02T03:04:05Z"))
    assert stored.created == "2026-01-02T03:04:05Z"


def test_an_id_in_use_is_refused_and_nothing_is_stored(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    with pytest.raises(PersonaExists) as refused:
        registry.create_persona(persona(), job("j2"))
    assert refused.value.persona_id == "inn"
    with pytest.raises(JobNotFound):
        registry.get_job("j2")
    assert types(registry) == ["created", "queued"]


def test_persona_and_job_are_stored_together_or_not_at_all(registry: Registry) -> None:
    registry.create_persona(persona("a"), job("j1", "a"))
    with pytest.raises(JobConflict, match="already a job 'j1'"):
        registry.create_persona(persona("b"), job("j1", "b"))
    with pytest.raises(PersonaNotFound):
        registry.get_persona("b")
    assert types(registry, "b") == []


def test_a_replayed_key_gives_the_same_pair(registry: Registry, clock: Clock) -> None:
    first = registry.create_persona(persona(), job(), "key", "body")
    again = registry.create_persona(persona(), job("j2"), "key", "body")
    assert first[2]
    assert again == (*first[:2], False)
    with pytest.raises(SettingError) as refused:
        registry.create_persona(persona("other"), job("j3", "other"), "key", "another body")
    assert refused.value.field == "Idempotency-Key"
    with pytest.raises(PersonaExists):
        registry.create_persona(persona(), job("j4"), "another key", "body")
    clock.now += 25 * 3600
    with pytest.raises(PersonaExists):
        registry.create_persona(persona(), job("j5"), "key", "body")
    assert registry.latest_job("inn") == first[1]


def test_one_key_from_many_threads_makes_one_persona(registry: Registry) -> None:
    results: list[tuple[Persona, Job | None, bool]] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        result = registry.create_persona(persona(f"p{number}"), job(f"j{number}", f"p{number}"), "key", "body")
        results.append(result)

    run_threads(create, 8)
    assert sum(is_new for _, _, is_new in results) == 1
    assert len({stored.id for stored, _, _ in results}) == 1
    assert len(registry.list_personas()) == 1


def test_personas_are_listed_by_id_in_pages(registry: Registry) -> None:
    for number in (3, 1, 2, 0):
        registry.create_persona(persona(f"p{number}", cast="even" if number % 2 == 0 else "odd"))
    registry.delete_persona("p2")
    assert [each.id for each in registry.list_personas()] == ["p0", "p1", "p3"]
    assert [each.id for each in registry.list_personas(limit=2)] == ["p0", "p1"]
    assert [each.id for each in registry.list_personas(limit=2, after="p1")] == ["p3"]
    assert [each.id for each in registry.list_personas(cast="odd", after="p1")] == ["p3"]
    assert registry.list_personas(after="p3") == []


def test_fields_are_updated(registry: Registry) -> None:
    before = registry.create_persona(persona())[0]
    after = registry.update_persona("inn", text="Merry.", flagged=True, sparsity=0.5)
    assert after == registry.get_persona("inn")
    assert (after.text, after.flagged, after.sparsity) == ("Merry.", True, 0.5)
    assert replace(after, text=before.text, flagged=False, sparsity=0.25, updated=before.updated) == before
    event = registry.events_after("inn")[-1]
    assert (event.type, event.data) == ("updated", {"fields": ["flagged", "sparsity", "text"]})
    with pytest.raises(PersonaNotFound):
        registry.update_persona("nobody", text="x")
    for field in ("id", "version", "deleted", "colour"):
        with pytest.raises(TypeError, match=field):
            registry.update_persona("inn", **{field: 1})


def test_a_deleted_persona_is_not_found(registry: Registry) -> None:
    registry.create_persona(persona())
    registry.add_version(version(1), serve=True)
    registry.delete_persona("inn")
    for call in (
        lambda: registry.get_persona("inn"),
        lambda: registry.update_persona("inn", name="x"),
        lambda: registry.delete_persona("inn"),
        lambda: registry.add_version(version(2), serve=True),
        lambda: registry.next_version("inn"),
        lambda: registry.get_version("inn", 1),
        lambda: registry.list_versions("inn"),
        lambda: registry.set_serving("inn", 1),
        lambda: registry.create_job(job()),
    ):
        with pytest.raises(PersonaNotFound):
            call()
    assert types(registry)[-1] == "deleted"


def test_deleting_cancels_the_jobs(registry: Registry) -> None:
    registry.create_persona(persona(), job("j1"))
    registry.claim_job("w", 60)
    registry.request_cancel("j1")
    registry.create_job(job("j2"))
    registry.delete_persona("inn")
    assert registry.get_job("j1").status == registry.get_job("j2").status == "cancelled"
    assert not registry.renew_lease("j1", "w", 60)
    assert registry.claim_job("w", 60) is None


def test_the_id_of_a_deleted_persona_can_be_taken_again(registry: Registry) -> None:
    registry.create_persona(persona(), job(), "key", "body")
    registry.claim_job("w", 60)
    registry.add_version(version(1), serve=True)
    last = registry.last_seq()
    registry.delete_persona("inn")
    stored, fresh, is_new = registry.create_persona(persona(), job("j2"), "key", "body")
    assert is_new
    assert stored.version is None
    assert fresh == registry.latest_job("inn")
    assert registry.list_versions("inn") == []
    assert registry.next_version("inn") == 2  # "inn@1" never means two masks
    assert types(registry) == ["created", "queued"]
    assert registry.events_after("inn")[0].seq > last
    assert not registry.renew_lease("j1", "w", 60)
    with pytest.raises(JobNotFound):
        registry.add_version(version(2), serve=True, job_id="j1", worker="w")


# Versions


def test_publishing_points_the_persona_at_the_version(registry: Registry) -> None:
    registry.create_persona(persona())
    registry.update_persona("inn", flagged=True)
    assert registry.next_version("inn") == 1
    stored = registry.add_version(version(1), serve=True)
    assert stored == registry.get_version("inn", 1)
    serving = registry.get_persona("inn")
    assert (serving.version, serving.text, serving.system_prompt) == (1, "Text 1.", "Prompt 1.")
    assert not serving.flagged
    event = registry.events_after("inn")[-1]
    assert (event.type, event.data) == ("published", {"version": 1, "digest": stored.digest, "serving": True})
    registry.add_version(version(2), serve=False)
    assert registry.get_persona("inn") == serving
    assert [each.number for each in registry.list_versions("inn")] == [1, 2]


def test_only_the_next_number_is_taken(registry: Registry) -> None:
    registry.create_persona(persona())
    for number in (0, 2):
        with pytest.raises(JobConflict, match="the next is 1"):
            registry.add_version(version(number), serve=True)
    registry.add_version(version(1), serve=True)
    with pytest.raises(JobConflict, match="version 1 of 'inn' cannot be added: the next is 2"):
        registry.add_version(version(1), serve=True)
    with pytest.raises(PersonaNotFound):
        registry.add_version(version(1, "nobody"), serve=True)
    with pytest.raises(VersionNotFound):
        registry.get_version("inn", 2)


def test_rolling_back_serves_the_earlier_version_whole(registry: Registry) -> None:
    registry.create_persona(persona())
    registry.add_version(version(1), serve=True)
    registry.add_version(version(2), serve=True)
    back = registry.set_serving("inn", 1)
    assert back == registry.get_persona("inn")
    assert (back.version, back.text, back.system_prompt) == (1, "Text 1.", "Prompt 1.")
    assert registry.next_version("inn") == 3
    assert registry.events_after("inn")[-1].data == {"version": 1, "digest": version(1).digest}
    with pytest.raises(VersionNotFound) as missing:
        registry.set_serving("inn", 9)
    assert (missing.value.persona_id, missing.value.version) == ("inn", 9)


def test_publishing_for_a_job_ends_it_in_the_same_transaction(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    registry.claim_job("w", 60)
    registry.add_version(version(1), serve=True, job_id="j1", worker="w")
    assert registry.get_job("j1").status == "succeeded"
    assert types(registry)[-2:] == ["published", "succeeded"]


def test_a_job_that_is_not_held_any_more_publishes_nothing(registry: Registry, clock: Clock) -> None:
    registry.create_persona(persona(), job())
    with pytest.raises(JobConflict, match="may not publish"):
        registry.add_version(version(1), serve=True, job_id="j1", worker="w")
    registry.claim_job("w", 60)
    clock.now += 61
    registry.claim_job("other", 60)
    with pytest.raises(JobConflict):
        registry.add_version(version(1), serve=True, job_id="j1", worker="w")
    registry.request_cancel("j1")
    with pytest.raises(JobConflict):
        registry.add_version(version(1), serve=True, job_id="j1", worker="other")
    assert registry.get_persona("inn").version is None
    assert "published" not in types(registry)


def test_a_reader_sees_the_old_version_or_the_new_one(registry: Registry) -> None:
    registry.create_persona(persona())
    registry.add_version(version(1), serve=True)
    done = threading.Event()
    torn: list[object] = []

    def look(_: int) -> None:
        last = 0
        while not done.is_set():
            seen = registry.get_persona("inn")
            assert seen.version is not None
            held = registry.get_version("inn", seen.version)
            if (seen.text, seen.system_prompt) != (held.text, held.system_prompt) or seen.version < last:
                torn.append((seen, held))
            last = seen.version

    def publish(_: int) -> None:
        for number in range(2, 60):
            registry.add_version(version(number), serve=True)
        done.set()

    run_threads(lambda number: publish(number) if number == 0 else look(number), 4)
    assert torn == []
    assert registry.get_persona("inn").version == 59


# Jobs


def test_jobs_are_claimed_oldest_first(registry: Registry) -> None:
    for number in range(3):
        registry.create_persona(persona(f"p{number}"), job(f"j{number}", f"p{number}"))
    assert [registry.queue_position(f"j{number}") for number in range(3)] == [0, 1, 2]
    claimed = registry.claim_job("w", 60)
    assert claimed is not None
    assert claimed == registry.get_job("j0")
    assert (claimed.status, claimed.worker, claimed.attempts) == ("running", "w", 1)
    assert [registry.queue_position(f"j{number}") for number in range(3)] == [0, 1, 2]
    registry.finish_job("j0", "succeeded")
    assert [registry.queue_position(f"j{number}") for number in range(3)] == [0, 0, 1]
    assert [claim.id for _ in range(3) if (claim := registry.claim_job("w", 60))] == ["j1", "j2"]


def test_an_expired_lease_is_claimed_again(registry: Registry, clock: Clock) -> None:
    registry.create_persona(persona(), job())
    registry.claim_job("dead", 10)
    registry.report_progress("j1", "learn", 5, 60)
    clock.now += 9.9
    assert registry.claim_job("other", 10) is None
    assert registry.renew_lease("j1", "dead", 10)
    clock.now += 9.9
    assert registry.claim_job("other", 10) is None
    clock.now += 0.2
    again = registry.claim_job("other", 10)
    assert again is not None
    assert (again.worker, again.attempts, again.stage, again.completed) == ("other", 2, "learn", 5)
    assert not registry.renew_lease("j1", "dead", 10)
    assert registry.renew_lease("j1", "other", 10)


def test_the_leases_of_a_dead_worker_are_released(registry: Registry) -> None:
    for number in range(2):
        registry.create_persona(persona(f"p{number}"), job(f"j{number}", f"p{number}"))
    registry.claim_job("dead", 600)
    registry.claim_job("alive", 600)
    assert registry.release_leases("dead") == 1
    claimed = registry.claim_job("next", 600)
    assert claimed is not None
    assert (claimed.id, claimed.attempts) == ("j0", 2)
    assert registry.claim_job("next", 600) is None


def test_of_many_threads_exactly_one_claims_a_job(registry: Registry) -> None:
    for number in range(30):
        registry.create_persona(persona(f"p{number}"), job(f"j{number}", f"p{number}"))
    claims: list[str] = []

    def claim(number: int) -> None:
        while (claimed := registry.claim_job(f"w{number}", 60)) is not None:
            claims.append(claimed.id)

    run_threads(claim, 8)
    assert sorted(claims) == sorted(f"j{number}" for number in range(30))


def test_a_persona_has_one_active_job(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    with pytest.raises(JobConflict) as refused:
        registry.create_job(job("j2"))
    assert (refused.value.persona_id, refused.value.job_id) == ("inn", "j1")
    registry.claim_job("w", 60)
    with pytest.raises(JobConflict, match="being sculpted by job 'j1'"):
        registry.create_job(job("j2"))
    registry.request_cancel("j1")
    registry.create_job(job("j2"))
    assert registry.latest_job("inn") == registry.get_job("j2")
    with pytest.raises(PersonaNotFound):
        registry.create_job(job("j3", "nobody"))


def test_a_queued_job_is_cancelled_at_once(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    assert registry.request_cancel("j1").status == "cancelled"
    assert registry.request_cancel("j1").status == "cancelled"
    assert registry.claim_job("w", 60) is None
    assert types(registry) == ["created", "queued", "cancelled"]


def test_a_running_job_is_asked_to_stop(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    registry.claim_job("w", 60)
    asked = registry.request_cancel("j1")
    assert (asked.status, asked.cancel_requested) == ("running", True)
    registry.request_cancel("j1")
    assert not registry.renew_lease("j1", "w", 60)
    assert registry.finish_job("j1", "cancelled").status == "cancelled"
    assert types(registry) == ["created", "queued", "started", "cancelling", "cancelled"]


def test_a_job_asked_to_stop_whose_worker_died_becomes_cancelled(registry: Registry, clock: Clock) -> None:
    registry.create_persona(persona(), job())
    registry.create_persona(persona("next"), job("j2", "next"))
    registry.claim_job("dead", 10)
    registry.request_cancel("j1")
    clock.now += 11
    claimed = registry.claim_job("other", 10)
    assert claimed is not None
    assert claimed.id == "j2"
    assert registry.get_job("j1").status == "cancelled"


def test_a_job_ends_once(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    registry.claim_job("w", 60)
    with pytest.raises(JobConflict, match="held by worker 'w'"):
        registry.finish_job("j1", "failed", worker="other")
    failed = registry.finish_job("j1", "failed", "the disk is full", worker="w")
    assert (failed.status, failed.error, failed.is_final) == ("failed", "the disk is full", True)
    assert registry.finish_job("j1", "succeeded") == failed
    assert registry.request_cancel("j1") == failed
    event = registry.events_after("inn")[-1]
    assert (event.type, event.data, event.job_id) == ("failed", {"error": "the disk is full"}, "j1")


def test_progress_is_the_row_and_an_event(registry: Registry) -> None:
    registry.create_persona(persona(), job())
    registry.report_progress("j1", "select", 1, 2)  # not running yet
    registry.claim_job("w", 60)
    registry.report_progress("j1", "select", 1, 2, 3.5, {"message": "scoring"})
    registry.report_progress("j1", "select", 2, 2, float("inf"), {"loss": float("nan")})
    registry.report_progress("j1", "answer", 0, 9)
    seen = registry.get_job("j1")
    assert (seen.stage, seen.completed, seen.total, seen.eta_s) == ("answer", 0, 9, None)
    events = registry.events_after("inn")[3:]
    assert [event.type for event in events] == ["stage", "progress", "stage"]
    assert events[0].data == {
        "stage": "select",
        "completed": 1,
        "total": 2,
        "eta_s": 3.5,
        "message": "scoring",
    }
    assert events[1].data["loss"] is None
    assert events[1].data["eta_s"] is None
    registry.finish_job("j1", "succeeded")
    registry.report_progress("j1", "answer", 9, 9)
    assert types(registry)[-1] == "succeeded"


def test_unknown_jobs_are_not_found(registry: Registry) -> None:
    for call in (
        lambda: registry.get_job("gone"),
        lambda: registry.queue_position("gone"),
        lambda: registry.report_progress("gone", "x", 0, 0),
        lambda: registry.finish_job("gone", "failed"),
        lambda: registry.request_cancel("gone"),
    ):
        with pytest.raises(JobNotFound):
            call()
    assert not registry.renew_lease("gone", "w", 1)
    assert registry.latest_job("nobody") is None


# Events


def test_events_are_resumed_where_a_watcher_left(registry: Registry) -> None:
    registry.create_persona(persona("a"))
    registry.create_persona(persona("b"))
    added = [registry.add_event("ab"[number % 2], None, "note", {"n": number}) for number in range(10)]
    assert registry.events_after("a", seq=added[2].seq) == [added[4], added[6], added[8]]
    assert registry.events_after("a", seq=added[2].seq, limit=2) == [added[4], added[6]]
    assert registry.changes_after(added[6].seq) == added[7:]
    assert registry.changes_after(added[6].seq, limit=1) == [added[7]]
    assert registry.last_seq() == added[9].seq
    assert registry.changes_after(registry.last_seq()) == []
    assert registry.events_after("nobody") == []


def test_an_empty_registry_has_no_events(registry: Registry) -> None:
    assert registry.last_seq() == 0
    assert registry.changes_after() == []


def test_no_event_appears_behind_one_that_was_seen(registry: Registry) -> None:
    for number in range(4):
        registry.create_persona(persona(f"p{number}"))
    followed: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while True:
            last_round = done.is_set()
            seen = registry.changes_after(followed[-1] if followed else 0, limit=7)
            followed.extend(event.seq for event in seen)
            if last_round and not seen:
                return

    def add(number: int) -> None:
        for count in range(25):
            registry.add_event(f"p{number}", None, "note", {"count": count})

    follower = threading.Thread(target=follow)
    follower.start()
    run_threads(add, 4)
    done.set()
    follower.join(timeout=60)
    assert followed == [event.seq for event in registry.changes_after()]
    for number in range(4):
        notes = [event for event in registry.events_after(f"p{number}") if event.type == "note"]
        assert [event.data["count"] for event in notes] == list(range(25))


# The file


def test_what_was_stored_is_there_when_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "registry.db"
    with SQLiteRegistry(path) as registry:
        stored = registry.create_persona(persona(), job())
    with SQLiteRegistry(path) as registry:
        assert (registry.get_persona("inn"), registry.get_job("j1"), True) == stored


def test_a_closed_registry_refuses_work(tmp_path: Path) -> None:
    registry = SQLiteRegistry(tmp_path / "registry.db")
    registry.close()
    registry.close()
    with pytest.raises(RuntimeError, match="closed"):
        registry.list_personas()
    assert [entry.name for entry in tmp_path.iterdir()] == ["registry.db"]  # the log was folded in


def test_commits_are_flushed_and_readers_do_not_wait(tmp_path: Path) -> None:
    with SQLiteRegistry(tmp_path / "registry.db") as registry, registry._connections.write() as writing:
        assert writing.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert writing.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        assert registry.list_personas() == []


def test_many_threads_open_a_new_file_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    failures: list[BaseException] = []

    def open_and_add(number: int) -> None:
        barrier.wait()
        try:
            with SQLiteRegistry(tmp_path / "registry.db") as registry:
                registry.create_persona(persona(f"p{number}"))
        except BaseException as error:
            failures.append(error)

    run_threads(open_and_add, 6)
    assert failures == []
    with SQLiteRegistry(tmp_path / "registry.db") as registry:
        assert len(registry.list_personas()) == 6


def test_connections_are_reused_by_later_threads(registry: SQLiteRegistry) -> None:
    for _ in range(20):
        run_threads(lambda _: registry.list_personas(), 1)
    assert len(registry._connections._idle) == 1


def test_an_older_file_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.db"
    with SQLiteRegistry(path) as registry:
        registry.create_persona(persona(), job())
    later = (*MIGRATIONS, ("ALTER TABLE personas ADD COLUMN note TEXT", "UPDATE personas SET note = 'kept'"))
    monkeypatch.setattr(connections, "MIGRATIONS", later)
    with SQLiteRegistry(path) as registry:
        assert registry.get_persona("inn").name == "The innkeeper"
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT note FROM personas").fetchone() == ("kept",)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
    connection.close()
    monkeypatch.undo()
    with pytest.raises(SettingError, match="written by a newer Masquerade") as refused:
        SQLiteRegistry(path)
    assert refused.value.field == "data_dir"


def test_versions_from_before_attached_weights_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.db"
    monkeypatch.setattr(connections, "MIGRATIONS", MIGRATIONS[:1])
    SQLiteRegistry(path).close()
    columns = {name: value for name, value in asdict(version(1)).items() if not name.startswith("attached")}
    with sqlite3.connect(path) as connection:
        names, marks = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
        connection.execute(f"INSERT INTO versions ({names}) VALUES ({marks})", tuple(columns.values()))
    connection.close()
    monkeypatch.undo()
    with SQLiteRegistry(path) as registry:
        registry.create_persona(persona())
        assert (registry.list_versions("inn"), version(1).attached) == ([version(1)], "")


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.db"
    SQLiteRegistry(path).close()
    broken = (*MIGRATIONS, ("ALTER TABLE personas ADD COLUMN note TEXT", "no SQL at all"))
    monkeypatch.setattr(connections, "MIGRATIONS", broken)
    with pytest.raises(sqlite3.OperationalError):
        SQLiteRegistry(path)
    monkeypatch.undo()
    with SQLiteRegistry(path) as registry:
        registry.create_persona(persona())


def test_a_file_that_is_no_registry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(SettingError, match="cannot be opened as a registry") as refused:
        SQLiteRegistry(path)
    assert refused.value.field == "data_dir"
    with pytest.raises(SettingError, match="cannot be"):
        SQLiteRegistry(path / "below" / "a file")


def test_a_full_disk_is_said_and_loses_nothing(registry: SQLiteRegistry) -> None:
    registry.create_persona(persona(), job())
    with registry._connections.read() as connection:  # the only connection so far
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull, match=r"registry\.db"):
        registry.create_persona(persona("big", teacher="x" * 100_000), job("j2", "big"))
    assert [each.id for each in registry.list_personas()] == ["inn"]
    with registry._connections.read() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    registry.create_persona(persona("big"), job("j2", "big"))


def test_the_specs_of_jobs_are_standard_json(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        registry.create_persona(persona(), replace(job(), spec={"loss": float("nan")}))
    registry.create_persona(persona(), job())
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        (text,) = connection.execute("SELECT spec FROM jobs").fetchone()
    connection.close()
    assert json.loads(text) == job().spec


def run_threads(target: Callable[[int], object], count: int) -> None:
    threads = [threading.Thread(target=target, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
