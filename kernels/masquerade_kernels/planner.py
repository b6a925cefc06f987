"""Which tokens of a step run on which pack: a pure function of plain data, no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one sequence in a step."""

    persona: str | None  # digest; None: the base
    num_tokens: int
    pinned: bool = False  # to the dense pack, whatever it costs: the request asked to be reproducible
    own: bool = False  # the persona has FFN weights of its own: its pack alone computes it, and is resident


@dataclass(frozen=True, slots=True)
class PackFacts:
    """What the planner knows of a resident pack; the dense one is always there and needs none."""

    members: frozenset[str]  # digests it computes for
    fraction: float  # of the FFN's neurons


@dataclass(frozen=True, slots=True)
class Segment:
    """Runs, by their index in the step, that go through one pack together."""

    pack: str | None  # None: dense
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What a dense layer's FFN takes for a number of rows on this device, measured at a few and read between them.

    A pack of a share of the neurons takes that share of it, and every segment `per_segment` beside: the fixed part of
    three calls and of putting the rows together again. Gathered packs run other kernels than the dense one, so they
    have a curve of their own, of which they take their share.
    """

    points: tuple[tuple[int, float], ...]  # (rows, microseconds), ascending
    per_segment: float = 0.0  # microseconds
    gathered: tuple[tuple[int, float], ...] = ()  # as `points`, for packs other than the dense one; empty: as that one

    def __call__(self, num_rows: int) -> float:
        """Microseconds on the dense pack, linear between the points and beyond the last."""
        return _between(self.points, num_rows)

    def on(self, pack: PackFacts | None, num_rows: int) -> float:
        """Microseconds on a pack; None: the dense one."""
        return self(num_rows) if pack is None else pack.fraction * _between(self.gathered or self.points, num_rows)


def _between(points: Sequence[tuple[int, float]], num_rows: int) -> float:
    if num_rows == 0:
        return 0.0
    rows = [point[0] for point in points]
    at = min(max(bisect_right(rows, num_rows), 1), len(rows) - 1)
    (low, low_us), (high, high_us) = points[at - 1], points[at]
    return low_us + (high_us - low_us) * max(0, num_rows - low) / (high - low)


# Two threads of an AVX512-BF16 machine, a layer of 1,536 neurons of 576 in bf16 (benchmarks/planner_thresholds.py).
DEFAULT_COSTS = RowCosts(((1, 190.0), (16, 260.0), (32, 340.0), (64, 560.0), (128, 1050.0), (512, 4000.0)), 15.0)


@dataclass(frozen=True, slots=True)
class _Item:
    """Runs that move between packs together: one persona's decoding rows, or its prompt chunks."""

    persona: str | None
    runs: tuple[int, ...]
    num_rows: int
    own: bool


def plan_step(
    runs: Sequence[Run], resident: Mapping[str, PackFacts], costs: RowCosts = DEFAULT_COSTS
) -> tuple[Segment, ...]:
    """The cheapest cover of a step by resident packs that a greedy search finds; the dense segment, if any, is first.

    It starts with everything on the smallest pack that covers it all (the dense one, if no other does), or with each
    persona on the smallest of its own, whichever is cheaper. Then, as long as it lowers the step's cost, everything
    that some pack or the dense one covers (or only its prompt chunks) moves there. Within a segment runs stay in the
    order given. Runs of a persona with weights of its own have no choice: they go through the pack under its digest.
    """
    items = _items(runs)
    own, free = [item for item in items if item.own], [item for item in items if not item.own]
    assert all(item.persona in resident for item in own), "a sequence runs when its own weights are loaded"
    return _segments(own + free, [item.persona for item in own] + _cheapest(runs, free, resident, costs))


def _cheapest(
    runs: Sequence[Run], items: Sequence[_Item], resident: Mapping[str, PackFacts], costs: RowCosts
) -> list[str | None]:
    """Each item's pack."""
    chunks = frozenset(i for i, item in enumerate(items) if any(runs[run].num_tokens > 1 for run in item.runs))
    useful = [key for key in resident if any(item.persona in resident[key].members for item in items)]
    together: list[str | None] = [_smallest_cover(items, resident)] * len(items)
    apart = [_smallest_cover([item], resident) for item in items]
    placed = min((together, apart), key=lambda placed: _cost(items, placed, resident, costs))
    cost = _cost(items, placed, resident, costs)
    while True:
        best, best_cost = placed, cost
        for key in (*useful, None):
            covered = [i for i, item in enumerate(items) if key is None or item.persona in resident[key].members]
            for movers in (covered, [i for i in covered if i in chunks]):
                trial = list(placed)
                for i in movers:
                    trial[i] = key
                if trial != placed:
                    trial_cost = _cost(items, trial, resident, costs)
                    if trial_cost < best_cost:
                        best, best_cost = trial, trial_cost
        if best is placed:
            return placed
        placed, cost = best, best_cost


def _items(runs: Sequence[Run]) -> list[_Item]:
    """Items by persona and kind; a pinned run counts as the base's, which only the dense pack covers.

    One of a persona with weights of its own needs no pin: there is but one pack for it.
    """

    def owner(index: int) -> tuple[str, bool, bool]:
        run = runs[index]
        based = run.persona is None or (run.pinned and not run.own)
        return "" if based else str(run.persona), run.num_tokens > 1, run.own

    items = []
    for (persona, _, own), group in groupby(sorted(range(len(runs)), key=owner), key=owner):
        indices = tuple(group)
        items.append(_Item(persona or None, indices, sum(runs[index].num_tokens for index in indices), own))
    return items


def _smallest_cover(items: Iterable[_Item], resident: Mapping[str, PackFacts]) -> str | None:
    personas = {item.persona for item in items}
    covers = [key for key, pack in resident.items() if personas <= pack.members]
    return min(covers, key=lambda key: resident[key].fraction, default=None)


def _cost(
    items: Sequence[_Item], placed: Sequence[str | None], resident: Mapping[str, PackFacts], costs: RowCosts
) -> float:
    rows: dict[str | None, int] = {}
    for item, key in zip(items, placed, strict=True):
        rows[key] = rows.get(key, 0) + item.num_rows
    return sum(
        costs.per_segment + costs.on(None if key is None else resident[key], num_rows) for key, num_rows in rows.items()
    )


def _segments(items: Sequence[_Item], placed: Sequence[str | None]) -> tuple[Segment, ...]:
    runs: dict[str | None, list[int]] = {}
    for item, key in zip(items, placed, strict=True):
        runs.setdefault(key, []).extend(item.runs)
    return tuple(Segment(key, tuple(sorted(runs[key]))) for key in sorted(runs, key=lambda key: (key is not None, key)))
