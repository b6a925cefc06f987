from __future__ import annotations

import numpy as np
import pytest

from masquerade_pruner.bootstrap import gap_closed, mean_interval


def test_gap_closed_is_paired() -> None:
    baseline = np.random.default_rng(0).uniform(0.2, 2.0, 100)
    closed = gap_closed([0.7 * baseline], [baseline])
    assert closed.mean == pytest.approx(0.3)
    assert closed.low == pytest.approx(0.3)  # every question closes the same share, so resampling changes nothing
    assert closed.high == pytest.approx(0.3)


def test_personas_count_the_same_whatever_their_questions() -> None:
    closed = gap_closed([np.array([0.5]), np.full(99, 0.9)], [np.array([1.0]), np.ones(99)])
    assert closed.mean == pytest.approx((0.5 + 0.1) / 2)


def test_interval_holds_the_mean_and_narrows_with_more_questions() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.5, 400)
    few, many = mean_interval(values[:25]), mean_interval(values)
    assert many.low < many.mean < many.high
    assert many.high - many.low < few.high - few.low
