"""Intervals: paired bootstrap over questions, nested in personas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For reports, rounded to what the interval can carry."""
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def mean_interval(values: Values, *, seed: int = 0) -> Interval:
    """The mean over questions."""
    draws = _draws(len(values), seed)
    means = values[draws].mean(axis=1)
    return Interval(float(values.mean()), *_bounds(means))


def gap_closed(ours: Sequence[Values], baseline: Sequence[Values], *, seed: int = 0) -> Interval:
    """1 - KL(ours) / KL(baseline), paired by question; several personas are resampled first, then their questions.

    Each sequence holds one array of per-question KL a persona; personas count the same.
    """
    ratios = [1 - one.mean() / other.mean() for one, other in zip(ours, baseline, strict=True)]
    rng = np.random.default_rng(seed)
    resampled = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        personas = rng.integers(0, len(ours), len(ours)) if len(ours) > 1 else [0]
        closed = []
        for persona in personas:
            questions = rng.integers(0, len(ours[persona]), len(ours[persona]))
            closed.append(1 - ours[persona][questions].mean() / baseline[persona][questions].mean())
        resampled[index] = np.mean(closed)
    return Interval(float(np.mean(ratios)), *_bounds(resampled))


def _draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _bounds(values: Values) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
