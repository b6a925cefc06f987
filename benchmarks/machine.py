"""The line that says where a table was measured."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from masquerade_engine.threads import barrier_settings


def as_served() -> None:
    """Start this script again with the thread settings that the server has, where the environment has others."""
    missing = barrier_settings(os.environ)
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})


def machine() -> str:
    """Processor, cores, memory, library versions and date."""
    memory = _field("/proc/meminfo", "MemTotal").split()
    gib = f"{int(memory[0]) / 2**20:.0f} GiB" if memory else "unknown memory"
    return (
        f"{_field('/proc/cpuinfo', 'model name') or platform.processor()}, {torch.get_num_threads()} threads, {gib}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
