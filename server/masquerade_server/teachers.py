"""Which teacher answers a sculpt: the base itself, or the operator's remote one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masquerade_server.remote_teacher import RemoteTeacher
    from masquerade_server.settings import TeacherSettings


@contextmanager
def open_teacher(wanted: str, configured: TeacherSettings | None, data_dir: Path) -> Iterator[RemoteTeacher | None]:
    """What `masquerade_pruner.sculpt` takes as its `teacher`; None where the base is wanted, or nothing configured.

    Raises `SettingError` for a data directory that cannot hold what the teacher says.
    """
    if wanted != "remote" or configured is None:
        yield None
        return
    from masquerade_server.remote_teacher import RemoteTeacher  # noqa: PLC0415  (imports the pruner, and so torch)

    with RemoteTeacher(configured, data_dir) as teacher:
        yield teacher
