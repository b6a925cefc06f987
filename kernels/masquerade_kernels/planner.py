"""Which tokens of a step run on which pack: a pure function of plain data, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

# Rows of one persona from which their own compact pack beats riding the decode's dense pack: a second pack is a second
# read of weights, which short chunks do not earn back. Per layer of 1536 neurons of 576 at 25 % sparsity, bf16, beside
# 16 decoding rows, one thread (benchmarks/planner_thresholds.py): 32 rows ride in 0.45 ms and take 0.58 on their own
# pack, 64 in 0.94 and 0.91, 128 in 3.1 and 2.5; at 50 % the own pack wins from 16 rows (0.85 and 0.59).
MIN_COMPACT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one sequence in a step."""

    persona: str | None  # digest; None: the base
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Runs, by their index in the step, that go through one pack together."""

    pack: str | None  # digest of a compact pack; None: dense
    runs: tuple[int, ...]


def plan_step(
    runs: Sequence[Run],
    resident: Container[str],
    *,
    min_compact_rows: int = MIN_COMPACT_ROWS,
) -> tuple[Segment, ...]:
    """The cheapest cover of a step by resident packs; the dense segment, if any, comes first.

    A step of one persona with a resident compact pack runs on that alone. Otherwise a persona whose prefill chunks
    (runs of more than one token) together reach `min_compact_rows` runs those on its compact pack, and all else rides
    the dense pack. Order within a segment is the order given.
    """
    only = runs[0].persona if len({run.persona for run in runs}) == 1 else None
    if only is not None and only in resident:
        return (Segment(only, tuple(range(len(runs)))),)
    rows: Counter[str] = Counter()
    for run in runs:
        if run.persona is not None and run.num_tokens > 1:
            rows[run.persona] += run.num_tokens
    compact = [persona for persona, n in rows.items() if n >= min_compact_rows and persona in resident]
    segments = [Segment(None, _runs_outside(runs, compact))]
    segments += [Segment(persona, _chunks_of(runs, persona)) for persona in compact]
    return tuple(segment for segment in segments if segment.runs)


def _runs_outside(runs: Sequence[Run], compact: Sequence[str]) -> tuple[int, ...]:
    return tuple(i for i, run in enumerate(runs) if run.num_tokens == 1 or run.persona not in compact)


def _chunks_of(runs: Sequence[Run], persona: str) -> tuple[int, ...]:
    return tuple(i for i, run in enumerate(runs) if run.num_tokens > 1 and run.persona == persona)
