"""`masquerade worker`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from masquerade_server.cli import options
from masquerade_server.logs import logging_setup

if TYPE_CHECKING:
    from masquerade_server.worker import Worker


def worker(
    config: options.Config = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.SculptDevice = None,
    checkpointing: options.Checkpointing = None,
    micro_batch: options.MicroBatch = None,
    log_level: options.LogLevel = None,
    teacher_url: options.TeacherUrl = None,
    teacher_model: options.TeacherModel = None,
    teacher_api_key: options.TeacherKey = None,
    teacher_concurrency: options.TeacherConcurrency = None,
    teacher_timeout_s: options.TeacherTimeout = None,
) -> None:
    """Sculpt the queued jobs of a data directory, beside a server started with --workers 0.

    \b
    masquerade serve --workers 0
    masquerade worker                    in another terminal, with the same settings

    A server starts a worker of its own, so you rarely need this. Ctrl-C stops it after the present step; the job
    goes on from its checkpoint when a worker starts again.
    """
    settings = options.settings_of(
        config,
        data_dir=data_dir,
        cache_dir=cache_dir,
        model=model,
        dtype=dtype,
        sculpt_device=device,
        sculpt_checkpointing=checkpointing,
        sculpt_micro_batch=micro_batch,
        log_level=log_level,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        teacher_api_key=teacher_api_key,
        teacher_concurrency=teacher_concurrency,
        teacher_timeout_s=teacher_timeout_s,
    )
    from masquerade_server.jobs import WorkerConfig  # noqa: PLC0415
    from masquerade_server.worker import run_worker  # noqa: PLC0415

    logging_setup(settings.log_level)
    run_worker(WorkerConfig.of(settings), _forever)


def _forever(worker: Worker) -> None:
    while not worker.stopping.is_set():
        time.sleep(3600)
