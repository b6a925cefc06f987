"""The line that says where a table was measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


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
