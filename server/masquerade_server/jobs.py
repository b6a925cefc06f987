"""The sculpt worker beside a server: one niced process, restarted when it dies, gone when the server goes."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from masquerade_server.settings import TeacherSettings

if TYPE_CHECKING:
    from masquerade_masks.registry import Registry
    from masquerade_server.settings import Settings

log = logging.getLogger("masquerade.jobs")

WORKER_COMMAND = (sys.executable, "-m", "masquerade_server.worker")
_STOP_GRACE_S = 8.0  # a step of learning takes up to 3 s on two cores; then its checkpoint
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_HEALTHY_S = 60.0  # a worker that lived this long did not die of its start


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker process is told, as one line of JSON on its standard input."""

    name: str  # unique: leases are held under it
    data_dir: str
    cache_dir: str
    model: str
    dtype: str
    device: str
    log_level: str
    checkpointing: str = "auto"
    micro_batch: int = 0  # 0: as many branches as fit
    teacher: TeacherSettings | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """A fresh name under the server's settings."""
        return cls(
            name=f"worker-{uuid.uuid4().hex[:12]}",
            data_dir=str(settings.data_dir),
            cache_dir=str(settings.cache_dir),
            model=settings.model,
            dtype=settings.dtype,
            device=settings.sculpt_device,
            log_level=settings.log_level,
            checkpointing=settings.sculpt_checkpointing,
            micro_batch=settings.sculpt_micro_batch,
            teacher=settings.teacher,
        )

    def to_line(self) -> bytes:
        """The line that `from_line` reads."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Raises `ValueError` for what is no such line."""
        payload: dict[str, Any] = json.loads(line)
        if payload["teacher"] is not None:
            payload["teacher"] = TeacherSettings(**payload["teacher"])
        return cls(**payload)


class WorkerSupervisor:
    """Keeps one worker process running, from `async with` to its end.

    The worker lives as long as its standard input: whatever ends this process, the pipe closes and the
    worker goes.
    """

    def __init__(self, settings: Settings, registry: Registry, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._settings = settings
        self._registry = registry
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        if self._settings.workers:
            self._watch = asyncio.create_task(self._keep_running())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        if self._watch is None:
            return
        if self._process is not None:
            _close_input(self._process)
        _, running = await asyncio.wait({self._watch}, timeout=_STOP_GRACE_S)
        if running:
            if self._process is not None and self._process.returncode is None:
                log.warning("the sculpt worker did not stop within %.0f s and is killed", _STOP_GRACE_S)
                self._process.kill()
            self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    async def _keep_running(self) -> None:
        backoff = _FIRST_BACKOFF_S
        while not self._closing:
            started = time.monotonic()
            config = WorkerConfig.of(self._settings)
            try:
                code = await self._run_one(config)
            except OSError as error:  # no more processes or memory
                log.error("the sculpt worker cannot be started: %s", error)
            else:
                if self._closing:
                    return
                log.error("the sculpt worker ended (%s); its job goes on in a new one", _describe_exit(code))
            # Its lease would expire by itself; this only lets the next worker begin at once.
            await asyncio.to_thread(self._registry.release_leases, config.name)
            if time.monotonic() - started > _HEALTHY_S:
                backoff = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)

    async def _run_one(self, config: WorkerConfig) -> int:
        """Start a worker and return its exit status. Raises `OSError`."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is the server's to handle; the worker ends when its input closes
        )
        self._process = process
        try:
            assert process.stdin is not None
            process.stdin.write(config.to_line())
            if self._closing:
                _close_input(process)
            return await process.wait()
        finally:
            self._process = None


def _close_input(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    return f"signal {-code}" + (": killed, perhaps for want of memory" if code == -9 else "")
