"""Progress: where a sculpt is, how long it will take, and the one place that looks for a cancellation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from masquerade_masks import SculptCancelled

# Time of a default sculpt by stage, measured on two cores with the bundled model; 1 is a sculpt without recovery.
STAGES = {"select": 0.06, "answer": 0.25, "learn": 0.52, "recover": 0.16, "evaluate": 0.17}
RECOVERY_STEPS = 8  # of that one's recovery
COUNT_EVERY_S = 10  # a stage's seconds are counted at the first report after so many, so a kill loses few


@dataclass(frozen=True, slots=True)
class Progress:
    """One piece of news."""

    stage: str
    completed: int
    total: int
    eta_s: float | None  # for the whole job
    loss: float | None  # nats a token, while learning
    message: str
    dropped: int = 0  # of the teacher's answers


class Reporter:
    """Turns "so many of so many" within a stage into progress with an eta over all stages."""

    def __init__(
        self,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
        add_seconds: Callable[[str, float], None],
        shares: Mapping[str, float] = STAGES,  # of the job's time, by stage in their order, in any unit
    ) -> None:
        self._shares = {name: share / sum(shares.values()) for name, share in shares.items()}
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._add_seconds = add_seconds
        self._stage = ""
        self._started = time.monotonic()
        self._counted = self._started  # up to where the running stage's seconds are counted
        self._share = 0.0  # of the job, at the last report
        self._given = 0.0  # ... that took this process no time: an earlier one did it
        self._working = False  # whether the running stage has reported work of this process

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name the running stage, and count its seconds even where it is interrupted or killed."""
        self._stage = name
        self._working = False
        self._counted = time.monotonic()
        self.at(0, 1, message=f"{name}: starting")
        try:
            yield
        finally:
            self._count()

    def at(self, completed: int, total: int, *, loss: float | None = None, message: str = "", dropped: int = 0) -> None:
        """Report, and raise `SculptCancelled` where the job was cancelled."""
        self.check()
        if time.monotonic() - self._counted >= COUNT_EVERY_S:
            self._count()
        eta = self._eta(completed / max(1, total))
        self._on_progress(Progress(self._stage, completed, total, eta, loss, message, dropped))

    def check(self) -> None:
        """Raise `SculptCancelled` where the job was cancelled."""
        if self._cancelled():
            raise SculptCancelled()

    def _count(self) -> None:
        now = time.monotonic()
        self._add_seconds(self._stage, now - self._counted)
        self._counted = now

    def _eta(self, done: float) -> float | None:
        names = list(self._shares)
        before = sum(self._shares[name] for name in names[: names.index(self._stage)])
        share = before + self._shares[self._stage] * done
        if not self._working:
            # Stages that were skipped, and as much of this one as its first report begins with.
            self._given += max(0.0, share - self._share)
            self._working = done > 0
        self._share = share
        elapsed, gained = time.monotonic() - self._started, share - self._given
        # Less than the first stage's share says little: a model is being loaded, files are being mapped.
        return round(elapsed * max(0.0, 1 - share) / gained, 1) if gained > 0.03 else None
