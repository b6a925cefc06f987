"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from masquerade_masks.errors import StorageFull
from masquerade_masks.strict_json import dump_bytes

# EFBIG: a limit on the size of files (ulimit -f) is a full disk to the one who meets it.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview], num_bytes: int | None = None) -> None:
    """Replace the file at `path` by `data`: readers and power cuts see the old bytes or the new ones, whole.

    Of data in chunks, `num_bytes` says how many an error may name.

    Raises `StorageFull`; the old file stays and nothing is left beside it. Other `OSError`s pass through.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    chunks, size = ([data], len(data)) if isinstance(data, bytes) else (data, num_bytes)
    with storage_full_as_error(path, size):
        try:
            write_flushed(temporary, chunks)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        flush_directory(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_atomic` of indented UTF-8 JSON; numbers that are not finite become null."""
    write_atomic(path, dump_bytes(value))


def write_flushed(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Create the new file `path` and return once the chunks, one after another, are on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for chunk in chunks:
            left = memoryview(chunk)
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Return once the directory's entries are on the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_full_as_error(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """Turn the `OSError` of a full disk, quota or file-size limit into `StorageFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(path, needed_bytes) from error
        raise
