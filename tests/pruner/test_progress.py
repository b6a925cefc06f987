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


@pytest.mark.parametrize("resumed", [("select", 0), ("answer", 400), ("learn", 700)])
def test_what_an_earlier_process_did_does_not_shorten_what_is_left(
    monkeypatch: pytest.MonkeyPatch, resumed: tuple[str, int]
) -> None:
    """A job whose stages take as long as they are reckoned to, killed once: its eta is right from the first one on."""
    now, seconds = 0.0, 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    news: list[tuple[float, Progress]] = []
    reporter = Reporter(lambda one: news.append((now, one)), lambda: False, lambda stage, spent: None)
    names, total = list(STAGES), sum(STAGES.values())
    first, begins = resumed
    for stage in names[names.index(first) :]:
        with reporter.stage(stage):
            for done in range((begins if stage == first else 0) + 1, 1001):
                now += seconds * STAGES[stage] / total / 1000
                reporter.at(done, 1000)
    told = [(at, one.eta_s) for at, one in news if one.eta_s is not None]
    assert len(told) > 100
    assert all(eta == pytest.approx(now - at, rel=0.03, abs=1.0) for at, eta in told)
