"""The worker's loop, in this process, over a real registry and real files."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_sculpting
import pytest
import torch
from running_server import settings_for, wait_until

from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import InsufficientMemory, StorageFull, fingerprint_directory
from masquerade_masks.registry import Job, Persona, SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server import worker as worker_module
from masquerade_server.activity import activity_file, chats_active
from masquerade_server.jobs import WorkerConfig
from masquerade_server.worker import MAX_CRASHES, Crashes, JobWatch, ThreadShare, Worker, failure_sentence
from masquerade_server.worker_lock import WorkerLock, dead_workers

SPEC = {"sparsity": 0.5, "recovery": "none", "teacher": "base", "preset": "smoke", "seed": 1}


class Workshop:
    """A registry, its files and a worker that runs in a thread."""

    def __init__(self, config: WorkerConfig, registry: SQLiteRegistry, fingerprint: str) -> None:
        self.config = config
        self.registry = registry
        self.fingerprint = fingerprint
        self.data_dir = Path(config.data_dir)
        self.files = PersonaFiles(self.data_dir)
        self.worker = Worker(config, registry)
        self._thread: threading.Thread | None = None

    def queue(self, text: str, persona_id: str = "mira", **spec: Any) -> Job:
        """A persona with a queued sculpt."""
        persona = Persona(persona_id, "Mira", text, persona_system_prompt("Mira", text), base=self.fingerprint)
        job = Job(f"job-{persona_id}", persona_id, spec={"name": "Mira", "text": text, **SPEC, **spec})
        _, stored, _ = self.registry.create_persona(persona, job)
        assert stored is not None
        return stored

    def start(self, config: WorkerConfig | None = None) -> Worker:
        self.worker = Worker(config or self.config, self.registry)
        self._thread = threading.Thread(target=self.worker.run)
        self._thread.start()
        return self.worker

    def stop(self) -> None:
        if self._thread is not None:
            self.worker.stop()
            self._thread.join(20)
            assert not self._thread.is_alive()

    def ended(self, job: Job) -> Job:
        """The job, once it has."""
        return wait_until(  # type: ignore[no-any-return]
            lambda: found if (found := self.registry.get_job(job.id)).is_final else None, "the job to end"
        )

    def running(self, job: Job, step: int = 1) -> Job:
        """The job, once it has come to a step."""
        return wait_until(  # type: ignore[no-any-return]
            lambda: found if (found := self.registry.get_job(job.id)).completed >= step else None, "a step"
        )

    @property
    def workdir(self) -> Path:
        return self.data_dir / "jobs"


@pytest.fixture
def workshop(tmp_path: Path, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    monkeypatch.setattr(worker_module, "load_sculpting", fake_sculpting.load_sculpting)
    settings = settings_for(tmp_path / "data", tiny_base_dir)
    with SQLiteRegistry(settings.data_dir / "registry.sqlite") as registry:
        fingerprint = fingerprint_directory(tiny_base_dir, settings.cache_dir)
        found = Workshop(WorkerConfig.of(settings), registry, fingerprint)
        yield found
        found.stop()


def test_a_job_is_sculpted_published_and_cleared_away(workshop: Workshop) -> None:
    job = workshop.queue("Mira is patient.")
    workshop.start()
    assert workshop.ended(job).status == "succeeded"
    persona = workshop.registry.get_persona("mira")
    (version,) = workshop.registry.list_versions("mira")
    assert persona.version == version.number == 1
    stored = workshop.files.read_mask("mira", 1)
    assert stored.subnetwork.digest == version.digest
    assert stored.header.persona == "mira"
    assert stored.header.settings["preset"] == "smoke"
    assert stored.header.prompt_sha256 == version.prompt_sha256
    assert version.bytes == workshop.files.mask_path("mira", 1).stat().st_size
    assert (version.source, version.text) == ("sculpt", "Mira is patient.")
    assert workshop.files.read_report("mira", 1) == {"kept": 48, "cast": 0}
    assert "Tea?" in workshop.files.examples_path("mira", 1).read_text()
    wait_until(lambda: not list(workshop.workdir.iterdir()), "the working directory to go")


def test_a_sculpt_is_told_the_masks_of_its_cast(workshop: Workshop) -> None:
    for number in range(3):
        job = workshop.queue("Quick.", f"p{number}", seed=number)
        if number == 2:
            workshop.files.mask_path("p0", 1).write_bytes(b"damaged")
        workshop.start()
        assert workshop.ended(job).status == "succeeded"
        workshop.stop()
    reports = [workshop.files.read_report(f"p{number}", 1) for number in range(3)]
    assert [report and report["cast"] for report in reports] == [0, 1, 1]


def test_jobs_are_taken_in_order(workshop: Workshop) -> None:
    jobs = [workshop.queue("Quick.", f"p{number}") for number in range(3)]
    workshop.start()
    ended = [workshop.ended(job) for job in jobs]
    assert [one.status for one in ended] == ["succeeded"] * 3
    assert sorted(one.updated for one in ended) == [one.updated for one in ended]


def test_progress_is_thinned_but_keeps_beginnings_and_ends(workshop: Workshop) -> None:
    job = workshop.queue("Mira is slow.")
    workshop.start()
    workshop.ended(job)
    events = workshop.registry.events_after("mira", 0)
    learn = [one for one in events if one.data.get("stage") == "learn"]
    assert learn[0].data["completed"] == 0
    assert learn[0].data["loss"] == 1.0
    assert 3 <= len(learn) <= 8  # 20 steps in 2 s, at most two told a second
    assert [one.type for one in events if one.data.get("stage") == "evaluate"] == ["stage"]


def test_cancelling_stops_within_a_moment(workshop: Workshop) -> None:
    job = workshop.queue("Mira is slow.")
    workshop.start()
    workshop.running(job)
    workshop.registry.request_cancel(job.id)
    asked = time.monotonic()
    assert workshop.ended(job).status == "cancelled"
    assert time.monotonic() - asked < 2.0
    assert workshop.registry.list_versions("mira") == []
    wait_until(lambda: not list(workshop.workdir.iterdir()), "the working directory to go")


def test_deleting_a_persona_stops_its_sculpt(workshop: Workshop) -> None:
    job = workshop.queue("Mira is slow.")
    other = workshop.queue("Quick.", "other")
    workshop.start()
    workshop.running(job)
    workshop.registry.delete_persona("mira")
    assert workshop.ended(other).status == "succeeded"
    assert not workshop.files.directory("mira", 1).exists()


@pytest.mark.parametrize(
    ("text", "says"), [("Mira fails.", "ZeroDivisionError"), ("Mira's disk.", "disk is full; free some space")]
)
def test_a_failure_is_a_sentence_without_secrets(workshop: Workshop, text: str, says: str) -> None:
    job = workshop.queue(text)
    next_one = workshop.queue("Quick.", "next")
    workshop.start()
    failed = workshop.ended(job)
    assert failed.status == "failed"
    assert failed.error is not None
    assert says in failed.error
    assert "secret" not in failed.error
    assert workshop.ended(next_one).status == "succeeded"


def test_a_full_disk_while_publishing_fails_the_job_and_keeps_the_old_version(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = workshop.queue("Mira is patient.")
    workshop.start()
    workshop.ended(first)

    def full(*args: Any, **kwargs: Any) -> None:
        raise StorageFull("/secret/path", 10)

    monkeypatch.setattr(PersonaFiles, "publish_version", full)
    spec = {"name": "Mira", "text": "Mira is new.", **SPEC}
    second = workshop.registry.create_job(Job("job-2", "mira", spec=spec))
    failed = workshop.ended(second)
    assert (failed.status, failed.error) == (
        "failed",
        "the server's disk is full; free some space and sculpt again",
    )
    persona = workshop.registry.get_persona("mira")
    assert (persona.version, persona.text) == (1, "Mira is patient.")
    assert workshop.files.read_mask("mira", 1)


def test_a_disk_too_full_even_for_the_verdict_is_told_when_it_can_be(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_PATIENCE_S", 0.05)
    refusals = [2]
    real = workshop.registry.finish_job

    def finish(*args: Any, **kwargs: Any) -> Job:
        if refusals[0]:
            refusals[0] -= 1
            raise StorageFull("/registry")
        return real(*args, **kwargs)

    monkeypatch.setattr(workshop.registry, "finish_job", finish)
    job = workshop.queue("Mira fails.")
    workshop.start()
    assert workshop.ended(job).status == "failed"


def test_a_worker_that_stops_leaves_the_job_to_the_next(workshop: Workshop) -> None:
    job = workshop.queue("Mira is slow.")
    workshop.start()
    reached = workshop.running(job, 3).completed
    workshop.stop()
    left = workshop.registry.get_job(job.id)
    assert left.status == "running"
    assert left.lease_expires == 0
    workshop.start(replace(workshop.config, name="the-next"))
    assert workshop.ended(job).status == "succeeded"
    learn = [one.data for one in workshop.registry.events_after("mira", 0) if "message" in one.data]
    resumed = next(data for data in learn if data["message"] not in ("from 0", "done"))
    assert resumed["completed"] >= reached
    assert workshop.registry.get_job(job.id).attempts == 2


def test_a_stop_is_no_crash(workshop: Workshop) -> None:
    job = workshop.queue("Mira is slow.")
    for number in range(MAX_CRASHES + 1):
        workshop.start(replace(workshop.config, name=f"worker-{number}"))
        workshop.running(job, 1 + number)
        time.sleep(0.15)
        workshop.stop()
    workshop.start(replace(workshop.config, name="last"))
    assert workshop.ended(job).status == "succeeded"


def test_a_job_that_keeps_killing_its_worker_fails(tmp_path: Path) -> None:
    for _ in range(MAX_CRASHES):
        Crashes(tmp_path / "job").enter()  # and never leaves
    with pytest.raises(Exception, match=f"died {MAX_CRASHES} times"):
        Crashes(tmp_path / "job").enter()


def test_a_job_taken_over_is_let_go(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job = workshop.queue("Mira is slow.")
    workshop.start()
    workshop.running(job)
    workshop.registry.release_leases(workshop.config.name)
    assert workshop.registry.claim_job("thief", 60.0) is not None
    other = workshop.queue("Quick.", "other")
    workshop.ended(other)  # the worker has let go of the first
    assert workshop.registry.get_job(job.id).worker == "thief"
    assert (workshop.workdir / job.id / "work").is_dir()  # the checkpoints are the thief's now


def test_a_lease_is_renewed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_RENEW_S", 0.1)
    monkeypatch.setattr(worker_module, "_CANCEL_POLL_S", 0.05)
    job = workshop.queue("Mira is slow.")
    workshop.start()
    first = workshop.running(job).lease_expires
    assert first is not None
    later = wait_until(lambda: _lease(workshop, job) > first, "the lease to be renewed")
    assert later


def _lease(workshop: Workshop, job: Job) -> float:
    return workshop.registry.get_job(job.id).lease_expires or 0.0


def test_tidying_frees_the_jobs_of_dead_workers_and_their_rubbish(workshop: Workshop) -> None:
    job = workshop.queue("Quick.")
    with WorkerLock(workshop.data_dir, "alive"):
        (workshop.data_dir / "workers" / "dead.lock").touch()
        assert workshop.registry.claim_job("dead", 3600.0) is not None
        for leftover in ("job-long-gone", job.id):
            (workshop.workdir / leftover).mkdir(parents=True)
        workshop.worker.tidy()
        assert [one.name for one in workshop.workdir.iterdir()] == [job.id]
        assert dead_workers(workshop.data_dir) == []
    claimed = workshop.registry.claim_job("next", 60.0)
    assert claimed is not None
    assert claimed.attempts == 2


# --- sharing the processor


def test_chats_are_active_for_a_second_after_the_last_beat(tmp_path: Path) -> None:
    path = activity_file(tmp_path)
    assert not chats_active(path)
    path.touch()
    assert chats_active(path)
    an_age_ago = time.time() - 5
    os.utime(path, (an_age_ago, an_age_ago))
    assert not chats_active(path)


def test_one_thread_while_chats_are_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(worker_module, "available_cores", lambda: 4)
    monkeypatch.setattr(worker_module, "_THREADS_S", 0.0)
    path, share = activity_file(tmp_path), ThreadShare()
    share.follow(path)
    assert threads == [4]
    path.touch()
    share.follow(path)
    share.follow(path)
    assert threads == [4, 1]
    path.unlink()
    share.follow(path)
    assert threads == [4, 1, 4]
    path.touch()
    share.follow(path)
    share.restore()
    assert threads == [4, 1, 4, 1, 4]


def test_progress_survives_a_full_disk(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job = workshop.queue("Quick.")
    workshop.registry.claim_job("w", 60.0)

    def full(*args: Any) -> None:
        raise StorageFull("/registry")

    monkeypatch.setattr(workshop.registry, "report_progress", full)
    with JobWatch(job, "w", workshop.registry, workshop.data_dir, threading.Event()) as watch:
        watch.progress(fake_sculpting.Progress("learn", 0, 1, None, None, ""))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "--sculpt-micro-batch"),
        (InsufficientMemory("cpu", 2 * 10**9, 10**9, "wait"), "needs about 2.0 GB"),
        (KeyError("x"), "KeyError"),
        (StorageFull("/x"), "disk is full"),
    ],
)
def test_sentences_for_failures(error: Exception, says: str) -> None:
    assert says in failure_sentence(error)


def test_a_worker_config_survives_its_line() -> None:
    config = WorkerConfig("w", "/d", "/c", "m", "auto", "cpu", "info")
    assert WorkerConfig.from_line(config.to_line().decode()) == config
    assert json.loads(config.to_line())["model"] == "m"
