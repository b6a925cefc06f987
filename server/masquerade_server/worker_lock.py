"""Who is alive: every worker holds a lock on a file of its own, which the system releases however it ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_FOLDER = "workers"


class WorkerLock:
    """Held while a worker runs. The name is unique to its process."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self._path = data_dir / _FOLDER / f"{name}.lock"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self._path.open("ab")
            if _try_lock(file):
                self._file = file
            else:  # another worker looks at it this very moment, before it was locked, and takes it for dead
                file.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        self._path.unlink(missing_ok=True)


def dead_workers(data_dir: Path) -> list[str]:
    """Names of workers whose process is gone; they are forgotten with this call."""
    folder = data_dir / _FOLDER
    return [path.stem for path in sorted(folder.glob("*.lock")) if _forget_if_dead(path)]


def _forget_if_dead(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("ab") as file:
        if _try_lock(file):
            path.unlink(missing_ok=True)
            return True
    return False


if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
