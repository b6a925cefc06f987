"""95 % intervals of ratios and slopes: what a table may claim from runs on a machine that is never quite still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from masquerade_pruner.bootstrap import RESAMPLES, Interval, mean_interval

_STRETCHES = 6
_STUDENT = 2.776  # the 97.5 % point for six stretches less the line's two parameters

Values = npt.NDArray[np.float64]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ours over theirs, run by run; both of the same round, so that what slowed one slowed the other."""
    return mean_interval(np.asarray(ours, np.float64) / np.asarray(theirs, np.float64))


def percentile_ratio(ours: Sequence[float], theirs: Sequence[float], percent: float) -> Interval:
    """A percentile of ours over the same of theirs; the two samples are resampled apart."""
    rng = np.random.default_rng(0)
    above, below = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    draws = _percentiles(above, percent, rng) / _percentiles(below, percent, rng)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(np.percentile(above, percent) / np.percentile(below, percent)), float(low), float(high))


def slope(moments: Sequence[float], values: Sequence[float]) -> Interval:
    """The slope of values over moments, which are in order and at least six.

    A straight line through the means of six stretches, with Student's interval: what a process holds at one moment is
    nearly what it held at the one before, so single values would promise too much. On values that move together over a
    twelfth of the time it held the true slope in 94 of 100 series, a block bootstrap of residuals in 80.
    """
    x, y = (
        np.array([part.mean() for part in np.array_split(np.asarray(one, np.float64), _STRETCHES)])
        for one in (moments, values)
    )
    gradient, offset = np.polyfit(x, y, 1)
    residuals = y - (gradient * x + offset)
    centred = x - x.mean()
    error = np.sqrt((residuals @ residuals) / (_STRETCHES - 2) / (centred @ centred))
    return Interval(float(gradient), float(gradient - _STUDENT * error), float(gradient + _STUDENT * error))


def _percentiles(values: Values, percent: float, rng: np.random.Generator) -> Values:
    draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
    found: Values = np.percentile(values[draws], percent, axis=1)
    return found
