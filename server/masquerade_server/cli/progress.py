"""The live display of a sculpt: stage, step, loss, time left; a line now and then where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 10.0


class SculptDisplay:
    """Shows one sculpt on standard error; a context manager."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn(f"{title}: {{task.description}}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._title = title
        self._task: TaskID | None = None
        self._doing = ""
        self._line_at = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def show(
        self,
        stage: str,
        completed: int | None,
        total: int | None,
        *,
        eta_s: float | None = None,
        loss: float | None = None,
        message: str | None = None,
        dropped: int = 0,
    ) -> None:
        """The present state; steps of one stage may come under several messages."""
        doing = f"{stage} ({message})" if message and message not in (stage, f"{stage}: starting") else stage
        shown = f"{dropped} dropped" if dropped else ""
        if loss is not None:
            shown = f"loss {loss:.3f}"
        if self._live:
            self._show_live(doing, completed or 0, total, shown, time_left(eta_s))
        elif doing != self._doing or time.monotonic() - self._line_at > _LINE_EVERY_S:
            self._line_at = time.monotonic()
            known = " ".join(value for value in (shown, time_left(eta_s)) if value)
            self._console.print(f"{self._title}: {doing} {completed}/{total} {known}".rstrip(), markup=False)
        self._doing = doing

    def _show_live(self, doing: str, completed: int, total: int | None, loss: str, left: str) -> None:
        if self._task is None or doing != self._doing:
            self._finish_line()
            self._task = self._progress.add_task(doing, total=total, completed=completed, loss=loss, left=left)
        else:
            self._progress.update(self._task, total=total, completed=completed, loss=loss, left=left)

    def _finish_line(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, left="")
            self._progress.stop_task(self._task)


def time_left(eta_s: float | None) -> str:
    """`2 min left`; nothing where it is not known."""
    if eta_s is None:
        return ""
    return f"{eta_s / 60:.0f} min left" if eta_s >= 90 else f"{eta_s:.0f} s left"
