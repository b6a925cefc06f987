"""The field's serving figures, by the definitions (and under the JSON names) of vLLM's `vllm bench serve`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from masquerade_masks import SettingError
from masquerade_server.bench.timeline import Failure, Timeline

PERCENTS = (50, 90, 99)
_SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one latency over a run, in milliseconds; NaN where nothing was measured."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Self:
        """Percentiles are interpolated linearly."""
        values = 1000 * np.fromiter(seconds, np.float64)
        if not values.size:
            return cls(*[float("nan")] * 4)
        return cls(float(values.mean()), *(float(one) for one in np.percentile(values, PERCENTS)))


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits, in milliseconds, that a request must keep, all of them, to count for goodput."""

    limits_ms: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `ttft:500 tpot:50`. Raises `SettingError`."""
        limits: dict[str, float] = {}
        for pair in text.replace(",", " ").split():
            name, _, value = pair.partition(":")
            if name not in _SLO_METRICS:
                raise SettingError("goodput", f"{pair!r} is not one of {', '.join(_SLO_METRICS)} and milliseconds")
            try:
                limits[name] = float(value)
            except ValueError:
                raise SettingError("goodput", f"{pair!r} should read {name}:500, in milliseconds") from None
            if not limits[name] > 0:
                raise SettingError("goodput", f"{pair!r} must be above 0 milliseconds")
        return cls(limits)

    def kept_by(self, timeline: Timeline) -> bool:
        """Whether a reply keeps every limit. A reply of one token has a TPOT of 0, as in vLLM."""
        seconds = {"ttft": timeline.ttft_s, "tpot": timeline.tpot_s or 0.0, "e2el": timeline.e2el_s}
        return all(1000 * seconds[name] <= limit for name, limit in self.limits_ms.items())


@dataclass(frozen=True, slots=True)
class Figures:
    """One run."""

    duration_s: float
    num_completed: int
    failures: Mapping[str, int]  # by kind
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    num_good: int | None = None  # requests within the SLO; None: no SLO was given
    examples: Mapping[str, str] = field(default_factory=dict)  # one message of each kind of failure

    @property
    def request_throughput(self) -> float:
        """Whole replies a second."""
        return self.num_completed / self.duration_s

    @property
    def request_goodput(self) -> float | None:
        """Whole replies within the SLO a second."""
        return None if self.num_good is None else self.num_good / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Output tokens a second."""
        return self.num_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """Prompt and output tokens a second."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.duration_s

    @property
    def cached_share(self) -> float:
        """Prompt tokens whose KV was there already, of all; NaN without any."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else float("nan")

    @property
    def latencies(self) -> dict[str, Distribution]:
        """TTFT, TPOT, ITL and E2EL."""
        return {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2el": self.e2el}

    def as_json(self) -> dict[str, Any]:
        """Under vLLM's names, so that its plots read ours; what was not measured is null."""
        payload: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": self.num_completed,
            "failed": sum(self.failures.values()),
            "total_input_tokens": self.num_prompt_tokens,
            "total_output_tokens": self.num_output_tokens,
            "cached_prompt_tokens": self.num_cached_tokens,
            "request_throughput": self.request_throughput,
            "request_goodput": self.request_goodput,
            "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
            "failures": dict(self.failures),
        }
        for name, distribution in self.latencies.items():
            payload[f"mean_{name}_ms"] = _finite(distribution.mean)
            payload[f"median_{name}_ms"] = _finite(distribution.p50)
            for percent in PERCENTS:
                payload[f"p{percent}_{name}_ms"] = _finite(getattr(distribution, f"p{percent}"))
        return payload


def figures_of(outcomes: Sequence[Timeline | Failure], duration_s: float, slo: Slo | None = None) -> Figures:
    """The figures of a run that took `duration_s` from its first departure to its last answer."""
    replies = [one for one in outcomes if isinstance(one, Timeline)]
    failures = [one for one in outcomes if isinstance(one, Failure)]
    return Figures(
        duration_s=duration_s,
        num_completed=len(replies),
        failures=Counter(one.kind for one in failures),
        num_prompt_tokens=sum(one.num_prompt_tokens for one in replies),
        num_cached_tokens=sum(one.num_cached_tokens for one in replies),
        num_output_tokens=sum(one.num_output_tokens for one in replies),
        ttft=Distribution.of(one.ttft_s for one in replies),
        tpot=Distribution.of(one.tpot_s for one in replies if one.tpot_s is not None),
        itl=Distribution.of(gap for one in replies for gap in one.itls_s),
        e2el=Distribution.of(one.e2el_s for one in replies),
        num_good=None if slo is None else sum(slo.kept_by(one) for one in replies),
        examples={one.kind: one.message for one in failures},
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
