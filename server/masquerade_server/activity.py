"""Whether chats are active, told across processes by the age of one file."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

BEAT_S = 0.25
_FRESH_S = 1.0  # four beats: a chat that just ended still counts


def activity_file(data_dir: Path) -> Path:
    """The file that a server with running chats touches."""
    return data_dir / "chats-active"


async def beat(path: Path, busy: Callable[[], bool]) -> None:
    """Touch `path` every `BEAT_S` while `busy()`; until cancelled."""
    while True:
        if busy():
            await asyncio.to_thread(_touch, path)
        await asyncio.sleep(BEAT_S)


def chats_active(path: Path) -> bool:
    """Whether a server of this data directory ran a chat within the last second. One stat, 2 microseconds."""
    try:
        return time.time() - os.stat(path).st_mtime < _FRESH_S
    except OSError:
        return False


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError:  # a full disk: sculpting then takes its share of a chat's time
        return
