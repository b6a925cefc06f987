"""Attention's two products for 16 keys at a time, in bf16 dot products: scores, and the sum of weighted values.

A KV head's whole group of query heads shares each read of a key. Keys beyond the last stand for it once more: their
scores are nobody's, and their values have weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from masquerade_kernels import cpu_dots as dots
from masquerade_kernels.cpu_dots import LANES

BLOCK = LANES  # keys
_WIDTH = 2 * LANES  # bf16 of one vector
_MOST_SUMS = 16  # that stay in registers


def takes(head_dim: int) -> bool:
    """Whether heads of this size fill whole vectors."""
    return head_dim % _WIDTH == 0


def lane_of(head_dim: int) -> list[int]:
    """Where `sum_values` leaves each dimension: 16-bit values are interleaved within quarters of a vector."""
    lanes = [0] * head_dim
    for vector in range(head_dim // _WIDTH):
        for half, quarter, place in ((h, q, p) for h in range(2) for q in range(4) for p in range(4)):
            dimension = vector * _WIDTH + quarter * 8 + half * 4 + place
            lanes[dimension] = vector * _WIDTH + half * LANES + quarter * 4 + place
    return lanes


@intrinsic(prefer_literal=True)
def score_keys(
    context: Any,
    group: Any,  # constants of the loop that is compiled
    head_dim: Any,
    query_at: Any,  # bf16 [group, head_dim]
    keys_at: Any,  # bf16 [.., head_dim], contiguous
    first: Any,  # of the 16 keys
    stop: Any,  # keys from here on stand for the last one
    scaling: Any,  # float32
    scores_at: Any,  # float32 [group, .., 16]
    scores_stride: Any,  # bytes between two query heads
    fetched_at: Any,  # what is needed soon, as much as 16 keys
) -> Any:
    """`scores[g, k] = query[g] · keys[first + k] * scaling`."""
    heads, size = group.literal_value, head_dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query_at, keys_at, first, stop, scaling, scores_at, stride, fetched_at = arguments[2:]
        _fetch(builder, fetched_at, size)
        rows = _rows(builder, keys_at, first, stop, size)
        factor = dots.in_all_lanes(builder, scaling)
        for g in range(heads):
            query = _vectors(builder, builder.add(query_at, dots.long(g * size * 2)), size)
            partial = []
            for row in rows:
                sums = dots.zeros()
                for part, key in zip(query, _vectors(builder, row, size), strict=True):
                    sums = dots.dot(builder, sums, part, key)
                partial.append(sums)
            scores = builder.fmul(_sums_of_all(builder, partial), factor)
            dots.store(builder, scores, builder.add(scores_at, dots.times(builder, stride, g)))
        return context.get_dummy_value()

    given = (query_at, keys_at, first, stop, scaling, scores_at, scores_stride, fetched_at)
    return types.void(group, head_dim, *given), generate


@intrinsic(prefer_literal=True)
def sum_values(
    context: Any,
    group: Any,  # constants of the loop that is compiled
    head_dim: Any,
    weights_at: Any,  # bf16 [group, .., 16], zero beyond the last key
    weights_stride: Any,  # bytes between two query heads
    values_at: Any,  # bf16 [.., head_dim], contiguous
    first: Any,
    stop: Any,
    sums_at: Any,  # float32 [group, head_dim], its dimensions as `lane_of` says
    fetched_at: Any,  # what is needed soon, as much as 16 values
) -> Any:
    """`sums[g] += Σ weights[g, k] values[first + k]`."""
    all_heads, size = group.literal_value, head_dim.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights_at, stride, values_at, first, stop, sums_at, fetched_at = arguments[2:]
        _fetch(builder, fetched_at, size)
        rows = _rows(builder, values_at, first, stop, size)
        vectors = size // LANES
        together = max(1, _MOST_SUMS // vectors)
        for start in range(0, all_heads, together):
            heads = range(start, min(start + together, all_heads))
            at = {g: builder.add(sums_at, dots.long(g * size * 4)) for g in heads}
            sums = {
                (g, v): dots.load(builder, builder.add(at[g], dots.long(v * 4 * LANES)), dots.SUMS)
                for g in heads
                for v in range(vectors)
            }
            for k in range(0, BLOCK, 2):
                pairs = _interleaved(builder, rows[k], rows[k + 1], size)
                for g in heads:
                    own = builder.add(weights_at, dots.times(builder, stride, g))
                    word = dots.load(builder, builder.add(own, dots.long(2 * k)), dots.WORD)
                    weights = dots.in_all_lanes(builder, word)
                    for v, pair in enumerate(pairs):
                        sums[g, v] = dots.dot(builder, sums[g, v], pair, weights)
            for (g, v), one in sums.items():
                dots.store(builder, one, builder.add(at[g], dots.long(v * 4 * LANES)))
        return context.get_dummy_value()

    given = (weights_at, weights_stride, values_at, first, stop, sums_at, fetched_at)
    return types.void(group, head_dim, *given), generate


def _fetch(builder: Any, at: Any, head_dim: int) -> None:
    for line in range(0, BLOCK * head_dim * 2, 64):
        dots.fetch(builder, builder.add(at, dots.long(line)))


def _rows(builder: Any, at: Any, first: Any, stop: Any, head_dim: int) -> list[Any]:
    """The addresses of 16 keys."""
    last = builder.sub(stop, dots.long(1))
    rows = []
    for k in range(BLOCK):
        key = builder.add(first, dots.long(k))
        inside = builder.icmp_signed("<", key, last)
        rows.append(builder.add(at, dots.times(builder, builder.select(inside, key, last), head_dim * 2)))
    return rows


def _vectors(builder: Any, at: Any, head_dim: int) -> list[Any]:
    return [
        dots.load(builder, builder.add(at, dots.long(2 * start)), dots.HALVES) for start in range(0, head_dim, _WIDTH)
    ]


def _interleaved(builder: Any, low_at: Any, high_at: Any, head_dim: int) -> list[Any]:
    """Two rows as pairs, dimension by dimension, in the order of `lane_of`."""
    pairs = []
    for low, high in zip(_vectors(builder, low_at, head_dim), _vectors(builder, high_at, head_dim), strict=True):
        for half in range(2):
            taken = [q * 8 + half * 4 + place for q in range(4) for place in range(4)]
            pairs.append(dots.shuffle(builder, low, high, [lane for d in taken for lane in (d, _WIDTH + d)]))
    return pairs


def _sums_of_all(builder: Any, vectors: Sequence[Any]) -> Any:
    """`result[i]` is the sum of all lanes of `vectors[i]`, for 16 of them: a tree of additions, two by two.

    A round brings two vectors into one, and each of its steps is one cheap shuffle: halves, then quarters of a vector,
    then pairs and single lanes within quarters.
    """
    rounds = [
        (range(8), range(8, 16)),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ]
    # Which vectors' sums a lane holds a part of, to put them in order at the end.
    parts = [(vector, [index] * LANES) for index, vector in enumerate(vectors)]
    for low, high in rounds:
        parts = [
            _added(builder, left, right, [*low, *(16 + lane for lane in low)], [*high, *(16 + lane for lane in high)])
            for left, right in zip(parts[::2], parts[1::2], strict=True)
        ]
    for low, high in (((0, 1), (2, 3)), ((0, 2), (1, 3))):
        lanes = [
            [side + 4 * quarter + lane for quarter in range(4) for side in (0, 16) for lane in taken]
            for taken in (low, high)
        ]
        parts = [_added(builder, left, right, *lanes) for left, right in zip(parts[::2], parts[1::2], strict=True)]
    (total, owners) = parts[0]
    return dots.shuffle(builder, total, ir.Constant(dots.SUMS, ir.Undefined), [owners.index(i) for i in range(LANES)])


def _added(
    builder: Any, left: tuple[Any, list[int]], right: tuple[Any, list[int]], low: list[int], high: list[int]
) -> tuple[Any, list[int]]:
    owners = [*left[1], *right[1]]
    assert [owners[lane] for lane in low] == [owners[lane] for lane in high], "lanes of one sum are added"
    halves = (dots.shuffle(builder, left[0], right[0], lanes) for lanes in (low, high))
    return builder.fadd(*halves), [owners[lane] for lane in low]
