"""Intervals: they hold the truth about as often as they say, and tell a leak from noise."""

from __future__ import annotations

import numpy as np
import pytest
from intervals import paired_ratio, percentile_ratio, slope


def test_a_ratio_is_taken_round_by_round() -> None:
    slow_rounds = [100.0, 50.0, 25.0]  # the machine was busy, for both alike
    found = paired_ratio([2 * one for one in slow_rounds], slow_rounds)
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_ratio_holds_it() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        machine = rng.normal(1, 0.2, 12)  # what slows both
        found = paired_ratio(1.5 * machine * rng.normal(1, 0.05, 12), machine)
        held += found.low <= 1.5 <= found.high
    assert 170 <= held <= 200  # 95 % of 200 is 190; a percentile bootstrap over 12 is a little narrow


def test_percentiles_are_compared_at_the_percent_asked_for() -> None:
    theirs = list(np.linspace(1, 2, 101))
    ours = [*theirs[:-5], *[10.0] * 5]  # the same but for a tail
    assert percentile_ratio(ours, theirs, 50).mean == pytest.approx(1.0)
    tail = percentile_ratio(ours, theirs, 99)
    assert tail.mean > 4
    assert tail.low <= tail.mean <= tail.high


def test_a_slope_and_its_interval() -> None:
    minutes = np.arange(72) / 12
    exact = slope(minutes, 100 + 3 * minutes)
    assert exact.mean == pytest.approx(3)
    assert exact.low == pytest.approx(3)
    assert exact.high == pytest.approx(3)


@pytest.mark.parametrize("shared", [1, 6])
def test_the_interval_of_a_slope_holds_it(shared: int) -> None:
    """A process's memory wanders: each look has most in common with the one before."""
    rng = np.random.default_rng(0)
    minutes = np.arange(72) / 12
    held = 0
    for _ in range(200):
        wandering = np.convolve(rng.normal(0, 1, 71 + shared), np.ones(shared) / shared, mode="valid")
        found = slope(minutes, wandering + 0.5 * minutes)
        held += found.low <= 0.5 <= found.high
    assert 180 <= held < 200  # 95 % of 200 is 190


def test_a_leak_is_above_the_noise() -> None:
    rng = np.random.default_rng(0)
    minutes = np.arange(72) / 12
    assert slope(minutes, 1500 + 5 * minutes + rng.normal(0, 4, 72)).low > 2
