"""What a remote teacher has said before: paid for once, kept on disk, never asked again."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

from masquerade_masks import SettingError, StorageFull

_BUSY_TIMEOUT_S = 30.0  # for another worker's write; one takes milliseconds


class TeacherCache:
    """Replies by the sha256 of all that they depend on; a context manager over one SQLite file.

    It holds texts of answers and nothing about where they come from.
    """

    def __init__(self, path: Path) -> None:
        """Raises `SettingError` for a file that cannot be used."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise SettingError("data_dir", f"{path} cannot be opened: {error}") from error
        try:
            # SQLite's defaults, a rollback journal at synchronous=FULL: a reply is on the disk when `put` returns.
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL)"
            )
        except sqlite3.Error as error:
            self._connection.close()
            raise SettingError("data_dir", f"{path} cannot be used as a cache of answers: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, key: str) -> tuple[str, str] | None:
        """Text and finish of a reply, or None."""
        found = self._connection.execute("SELECT text, finish FROM replies WHERE key = ?", (key,)).fetchone()
        return None if found is None else (str(found[0]), str(found[1]))

    def put(self, key: str, text: str, finish: str) -> None:
        """Keep a reply, durably. Raises `StorageFull`."""
        try:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, text, finish))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StorageFull(self._path) from error
            raise
