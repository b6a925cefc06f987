"""Progress over stages: what is left falls to 0, and no further."""

from __future__ import annotations

import itertools
import math

import pytest

from masquerade_pruner import progress
from masquerade_pruner.progress import STAGES, Progress, Reporter


@pytest.mark.parametrize("shares", [STAGES, {name: one for name, one in STAGES.items() if name != "recover"}])
def test_nothing_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch, shares: dict[str, float]) -> None:
    """Rounded shares can add up to a little more than 1."""
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    news: list[Progress] = []
    reporter = Reporter(news.append, lambda: False, lambda stage, seconds: None, shares)
    for stage in shares:
        with reporter.stage(stage):
            for done in range(11):
                reporter.at(done, 10)
    left = [one.eta_s for one in news if one.eta_s is not None]
    assert left[0] > left[-1] == 0.0
    assert math.copysign(1.0, left[-1]) == 1.0


def test_a_killed_stage_has_counted_all_but_its_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    spent: list[tuple[str, float]] = []
    reporter = Reporter(lambda news: None, lambda: False, lambda stage, seconds: spent.append((stage, seconds)))
    with reporter.stage("learn"):
        for done in range(1, 8):
            now = 4.0 * done
            reporter.at(done, 7)
        assert spent == [("learn", 12.0), ("learn", 12.0)]  # what a kill leaves
    assert sum(seconds for _, seconds in spent) == 28.0
