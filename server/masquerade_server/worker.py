"""The sculpt worker: claims jobs under a lease, sculpts, publishes. One process, one job at a time.

Beside a server it is started by `jobs.WorkerSupervisor`, reads its configuration from the first line of
its standard input and stops when that closes. `masquerade worker` runs the same loop by hand.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from masquerade_engine.threads import available_cores, yield_at_barriers
from masquerade_masks import (
    JobConflict,
    JobNotFound,
    MasqueradeError,
    PersonaNotFound,
    SculptCancelled,
    StorageFull,
)
from masquerade_masks.mask_file import MaskFile, MaskHeader
from masquerade_masks.registry import Job, JobStatus, SQLiteRegistry
from masquerade_masks.store import PersonaFiles, write_json_atomic
from masquerade_server.activity import activity_file, chats_active
from masquerade_server.jobs import WorkerConfig
from masquerade_server.logs import logging_setup, quiet_transformers
from masquerade_server.publishing import Publication, publish
from masquerade_server.teachers import open_teacher
from masquerade_server.worker_lock import WorkerLock, dead_workers

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_masks import Mask
    from masquerade_masks.registry import Registry

log = logging.getLogger("masquerade.worker")

LEASE_S = 20.0
_RENEW_S = 5.0
_CANCEL_POLL_S = 0.5
_CLAIM_POLL_S = 0.5
_PROGRESS_S = 0.5  # two events a second are enough for any display
_THREADS_S = 0.25
_NICENESS = 19  # a sixtieth of a busy core's time, all of an idle one's
_CAST_MASKS = 64  # of a cast's masks, those that a new one is pulled towards
_PATIENCE_S = 5.0
_HARD_EXIT_S = 6.0  # below the supervisor's grace
MAX_CRASHES = 3


class Stopping(MasqueradeError):
    """This process is to end; its job stays with its checkpoints for the next."""


@dataclass(frozen=True, slots=True)
class Sculpting:
    """What a worker sculpts with."""

    sculpt: Callable[..., Any]  # masquerade_pruner.sculpt, or a test's
    spec: Callable[..., Any]  # SculptSpec
    estimate: Callable[..., dict[str, Any]]  # of a spec and a base
    base: Base


def load_sculpting(config: WorkerConfig) -> Sculpting:
    """Import the pruner and load the base's description. Raises what `load_base` and `Execution` raise."""

    import masquerade_pruner as pruner  # noqa: PLC0415
    from masquerade_engine.base import load_base  # noqa: PLC0415

    quiet_transformers()
    base = load_base(config.model, cache_dir=Path(config.cache_dir), dtype=config.dtype, device=config.device)
    execution = pruner.Execution(cast(Any, config.checkpointing), config.micro_batch or None)
    return Sculpting(
        partial(pruner.sculpt, execution=execution),
        pruner.SculptSpec,
        partial(pruner.estimate, execution=execution),
        base,
    )


class Worker:
    """Claims and runs jobs of one data directory until `stop`."""

    def __init__(self, config: WorkerConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._data_dir = Path(config.data_dir)
        self._files = PersonaFiles(self._data_dir)
        self._sculpting: Sculpting | None = None
        self._attempt: Crashes | None = None
        self.stopping = threading.Event()

    def stop(self) -> None:
        """End after the present step, leaving the job to the next worker; callable from any thread."""
        self.stopping.set()

    def run(self) -> None:
        """Work until `stop`."""
        self.tidy()
        while not self.stopping.is_set():
            job = self._registry.claim_job(self._config.name, LEASE_S)
            if job is None:
                self.stopping.wait(_CLAIM_POLL_S)
            else:
                self.work_on(job)

    def tidy(self) -> None:
        """Free the jobs of workers that are dead, and remove what they and jobs that have ended left."""
        for name in dead_workers(self._data_dir):
            if self._registry.release_leases(name):
                log.info("worker %s is dead; its job goes on here", name)
        for workdir in self._jobs_dir.iterdir() if self._jobs_dir.is_dir() else ():
            if self._has_ended(workdir.name):
                shutil.rmtree(workdir, ignore_errors=True)
        self._files.tidy()

    def work_on(self, job: Job) -> None:
        """Run one claimed job to its end, or to the end of this process."""
        log.info("job %s sculpts persona %s (attempt %d)", job.id, job.persona_id, job.attempts)
        watch = JobWatch(job, self._config.name, self._registry, self._data_dir, self.stopping)
        workdir = self._jobs_dir / job.id
        self._attempt = Crashes(workdir)
        try:
            with watch:
                self._attempt.enter()
                self._sculpt_and_publish(job, watch, workdir / "work")
        except Stopping:
            self.put_down()
            log.info("job %s goes on when a worker starts again", job.id)
            return
        except (SculptCancelled, JobConflict, JobNotFound, PersonaNotFound) as ended:
            self._finish(job, "cancelled", None)
            log.info("job %s was cancelled: %s", job.id, ended)
        except Exception as error:
            reason = failure_sentence(error)
            log.error("job %s failed: %s", job.id, reason, exc_info=not isinstance(error, MasqueradeError))
            self._finish(job, "failed", reason)
        self._attempt = None
        if self._has_ended(job.id):  # another worker may have taken it over, checkpoints and all
            shutil.rmtree(workdir, ignore_errors=True)

    def put_down(self) -> None:
        """Leave the present job, if there is one, to the next worker, and without a mark against it."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.leave()
            self._registry.release_leases(self._config.name)

    @property
    def _jobs_dir(self) -> Path:
        return self._data_dir / "jobs"

    def _has_ended(self, job_id: str) -> bool:
        try:
            return self._registry.get_job(job_id).is_final
        except JobNotFound:
            return True

    def _sculpt_and_publish(self, job: Job, watch: JobWatch, workdir: Path) -> None:
        tools = self._tools()
        spec = tools.spec(persona_id=job.persona_id, **job.spec)
        with open_teacher(job.spec["teacher"], self._config.teacher, self._data_dir) as teacher:
            result = tools.sculpt(
                spec,
                tools.base,
                workdir,
                cache_dir=Path(self._config.cache_dir),
                teacher=teacher,
                cast=self._cast_masks(job, tools.base),
                progress=watch.progress,
                cancelled=watch.cancelled,
            )
        watch.check()
        header = MaskHeader(
            persona=job.persona_id,
            version=0,
            recovery=result.recovery,
            prompt_sha256=result.prompt_sha256,
            settings=result.settings,
        )
        publication = Publication(
            persona_id=job.persona_id,
            text=job.spec["text"],
            system_prompt=result.system_prompt,
            mask_file=MaskFile(result.subnetwork, header),
            source="sculpt",
            report=result.report,
            examples=result.examples_path,
        )
        version = publish(self._registry, self._files, publication, job_id=job.id, worker=self._config.name)
        log.info("persona %s, version %d is published: %s", job.persona_id, version.number, result.seconds)

    def _cast_masks(self, job: Job, base: Base) -> list[Mask]:
        """The masks that serve in the persona's cast, its own left out: what the new one is pulled towards."""
        cast = self._registry.get_persona(job.persona_id).cast
        masks: list[Mask] = []
        for other in self._registry.list_personas(limit=_CAST_MASKS, cast=cast):
            if other.id == job.persona_id or other.version is None:
                continue
            try:
                read = self._files.read_mask(other.id, other.version, base=base.fingerprint, shape=base.shape)
            except MasqueradeError as error:  # deleted meanwhile, damaged, or of an earlier base
                log.warning("the mask of %s does not count in cast %s: %s", other.id, cast, error)
                continue
            masks.append(read.subnetwork.mask)
        return masks

    def _tools(self) -> Sculpting:
        """Loaded with the first job: an idle worker holds neither torch nor the base."""
        if self._sculpting is None:
            self._sculpting = load_sculpting(self._config)
        return self._sculpting

    def _finish(self, job: Job, status: JobStatus, reason: str | None) -> None:
        """Tell how the job ended, if need be again and again: a full disk holds no registry row either."""
        while True:
            try:
                self._registry.finish_job(job.id, status, reason, worker=self._config.name)
                return
            except (JobConflict, JobNotFound):  # taken over, or deleted: others have told
                return
            except StorageFull as error:
                log.error("job %s has %s, and that cannot be written: %s", job.id, status, error)
                if self.stopping.wait(_PATIENCE_S):
                    return


class JobWatch:
    """Everything around a running job: its lease, its cancellation, its progress, its share of the processor.

    A context manager: a thread renews the lease meanwhile. `progress` and `cancelled` are the sculptor's
    callbacks and run in its thread.
    """

    def __init__(self, job: Job, worker: str, registry: Registry, data_dir: Path, stopping: threading.Event) -> None:
        self._job = job
        self._worker = worker
        self._registry = registry
        self._activity = activity_file(data_dir)
        self._stopping = stopping
        self._lost = threading.Event()  # cancelled, deleted or taken over
        self._done = threading.Event()
        self._keeper = threading.Thread(target=self._keep_lease, name="lease", daemon=True)
        self._stage = ""
        self._told_at = 0.0
        self._threads = ThreadShare()

    def __enter__(self) -> JobWatch:
        self._keeper.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._keeper.join()
        self._threads.restore()

    def cancelled(self) -> bool:
        """Whether to stop; called between steps. Also where the number of threads follows the chats."""
        self._threads.follow(self._activity)
        if self._stopping.is_set():
            raise Stopping("the worker is stopping")
        return self._lost.is_set()

    def check(self) -> None:
        """Raises `Stopping`, `SculptCancelled`."""
        if self.cancelled():
            raise SculptCancelled

    def progress(self, progress: Any) -> None:
        """Report a stage's beginning and end always, and two steps a second between."""
        now = time.monotonic()
        last = progress.completed >= progress.total
        if progress.stage == self._stage and not last and now - self._told_at < _PROGRESS_S:
            return
        self._stage, self._told_at = progress.stage, now
        extra = {"loss": progress.loss, "message": progress.message, "dropped": progress.dropped}
        try:
            self._registry.report_progress(
                self._job.id, progress.stage, progress.completed, progress.total, progress.eta_s, extra
            )
        except JobNotFound:
            self._lost.set()
        except StorageFull as error:  # progress is news, not work: go on without
            log.warning("progress cannot be written: %s", error)

    def _keep_lease(self) -> None:
        renewed_at = time.monotonic()
        while not self._done.wait(_CANCEL_POLL_S):
            try:
                job = self._registry.get_job(self._job.id)
                if job.status != "running" or job.cancel_requested or job.worker != self._worker:
                    self._lost.set()
                    return
                if time.monotonic() - renewed_at >= _RENEW_S:
                    renewed_at = time.monotonic()
                    self._registry.renew_lease(job.id, self._worker, LEASE_S)
            except JobNotFound:
                self._lost.set()
                return
            except Exception:  # a registry that is busy or full is asked again; the lease outlives three tries
                log.exception("the lease of job %s cannot be renewed", self._job.id)


class ThreadShare:
    """One thread while chats are active, all of them otherwise. For the thread that computes."""

    def __init__(self) -> None:
        self._all: int | None = None
        self._now: int | None = None
        self._looked_at = 0.0

    def follow(self, activity: Path) -> None:
        """Look at most every quarter second; a change takes effect with the next operation."""
        now = time.monotonic()
        torch = sys.modules.get("torch")
        if torch is None or now - self._looked_at < _THREADS_S:
            return
        self._looked_at = now
        if self._all is None:
            self._all = available_cores()
        wanted = 1 if chats_active(activity) else self._all
        if wanted != self._now:
            torch.set_num_threads(wanted)
            self._now = wanted

    def restore(self) -> None:
        """Leave with all threads."""
        if self._all is not None and self._now != self._all:
            sys.modules["torch"].set_num_threads(self._all)


class Crashes:
    """How often a worker died over one job: noted on entering, so that a kill leaves its trace."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._file = workdir / "attempt.json"
        self._count = 0

    def enter(self) -> None:
        """Raises `MasqueradeError` where the limit is reached."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        if self._file.is_file():
            before = json.loads(self._file.read_text("utf-8"))
            self._count = before["crashes"] + (1 if before["running"] else 0)
        if self._count >= MAX_CRASHES:
            raise MasqueradeError(
                f"the worker died {self._count} times over this job, most likely for want of memory; "
                "the server's log says more"
            )
        self._write(running=True)

    def leave(self) -> None:
        """The attempt ended by itself."""
        self._write(running=False)

    def _write(self, *, running: bool) -> None:
        write_json_atomic(self._file, {"crashes": self._count, "running": running})


def failure_sentence(error: Exception) -> str:
    """What a failed job says: for a user to act on, without the server's paths."""
    if isinstance(error, StorageFull) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return "the server's disk is full; free some space and sculpt again"
    if isinstance(error, MasqueradeError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the server ran out of memory while sculpting"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; a server without torch has none
        return "the GPU ran out of memory while sculpting: try a smaller --sculpt-micro-batch"
    return f"the sculpt failed unexpectedly ({type(error).__name__}); the server's log says more"


def run_worker(config: WorkerConfig, until: Callable[[Worker], None]) -> None:
    """Run a worker; `until` is called in a thread of its own and calls `stop` when it is time."""
    data_dir = Path(config.data_dir)
    with SQLiteRegistry(data_dir / "registry.sqlite") as registry, WorkerLock(data_dir, config.name):
        worker = Worker(config, registry)
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda number, frame: worker.stop())
        threading.Thread(target=until, args=(worker,), name="until", daemon=True).start()
        worker.run()


def _until_input_closes(worker: Worker) -> None:
    """The server holds the other end of standard input: its end is ours, whatever the step takes."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: a thread inside it would break the exit
        pass
    worker.stop()
    time.sleep(_HARD_EXIT_S)
    log.warning("the present step takes too long; its job goes on from the last checkpoint")
    worker.put_down()
    os._exit(0)


def main() -> None:
    """Beside a server: `python -m masquerade_server.worker`, configured by a line on standard input."""
    yield_at_barriers()
    config = WorkerConfig.from_line(sys.stdin.readline())
    logging_setup(config.log_level)
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    run_worker(config, _until_input_closes)


if __name__ == "__main__":
    main()
