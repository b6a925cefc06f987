"""Connections to one SQLite file: as many as there are threads at work, and transactions over them."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masquerade_masks.errors import SettingError, StorageFull
from masquerade_masks.registry.schema import MIGRATIONS

_BUSY_TIMEOUT_S = 30.0  # for another process's write; one takes milliseconds


class Connections:
    """A pool rather than one connection a thread: threads of an event loop's executor come and go.

    Writers of this process queue on a lock, which is fair; SQLite's own waiting between processes only polls.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._guard = threading.Lock()  # over the two above
        self._writing = threading.Lock()
        self._open_file()

    def close(self) -> None:
        """Close what is idle now and what is in use as soon as it is given back."""
        with self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its beginning; on the disk when this returns."""
        with self._writing, self._borrowed() as connection, self._transaction(connection, "IMMEDIATE"):
            yield connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent snapshot; it waits for no writer."""
        with self._borrowed() as connection, self._transaction(connection, "DEFERRED"):
            yield connection

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection, mode: str) -> Iterator[None]:
        try:
            connection.execute(f"BEGIN {mode}")
            yield
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StorageFull(self._path) from error
            raise
        finally:
            if connection.in_transaction:  # SQLite itself has rolled back after some errors
                connection.execute("ROLLBACK")

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            if self._closed:
                raise RuntimeError("the registry is closed")
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._connect()
        try:
            yield connection
        finally:
            with self._guard:
                # One still in a transaction is one whose rollback failed.
                keep = not (self._closed or connection.in_transaction)
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    def _open_file(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connect()
        except OSError as error:
            raise SettingError("data_dir", f"{self._path.parent} cannot be used: {error.strerror}") from error
        except sqlite3.DatabaseError as error:
            raise SettingError("data_dir", f"{self._path} cannot be opened as a registry: {error}") from error
        try:
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk, not in its cache
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if _schema_version(connection) == len(MIGRATIONS):
            return
        with self._transaction(connection, "IMMEDIATE"):
            version = _schema_version(connection)  # another process may have migrated meanwhile
            if version > len(MIGRATIONS):
                known = f"schema {version}, and this one knows {len(MIGRATIONS)}"
                raise SettingError("data_dir", f"{self._path} was written by a newer Masquerade ({known})")
            for statement in (statement for step in MIGRATIONS[version:] for statement in step):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _use_wal(connection: sqlite3.Connection) -> None:
    """The switch to WAL does not wait for other connections as statements do, so wait here."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
