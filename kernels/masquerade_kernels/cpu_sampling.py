"""Draws from bounded distributions, on the CPU: one compiled pass a row in place of sorting its vocabulary.

Probabilities are counted and summed by their leading bits, which puts them in order but for the few that share those:
a bound, and the draw, each fall into one such bin, and that one alone is sorted.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, njit, prange

from masquerade_kernels.cpu_values import MATH, Loop, by_size, exp, pointer

# Neighbours that are passed over together where none of them is likely. The maxima of 16 x 49152 scores took 1.2 ms in
# blocks of 16, 0.15 of 32 and 0.09 of 64 (one thread), and the smaller the blocks, the fewer tokens are looked at.
BLOCK = 32
_SHIFT = 19  # what is left of a float32's bits: the exponent and 4 of the mantissa
_BINS = (0x3F800000 >> _SHIFT) + 1  # for weights of at most 1
_PARALLEL_ROWS = 2
_TOKENS = 0xFFFFFFFF


@functools.cache
def sampling_loop(num_threads: int) -> Loop:
    """`draw` below."""
    return by_size(_draw(), _PARALLEL_ROWS, num_threads)


_compiled = njit(fastmath=MATH, error_model="numpy")


@njit(inline="always")
def _bin_of(weight: Any) -> Any:
    return np.float32(weight).view(np.int32) >> _SHIFT


@njit(fastmath=MATH | {"nnan"}, error_model="numpy")  # so that the greatest of a block is found in vectors
def _weigh(scores: Any, temperature: Any, weights: Any, greatest: Any) -> Any:
    """`weights = e ** ((scores - top) / temperature)`, their greatest by block, and their sum."""
    top = scores[0]
    for i in range(len(scores)):
        top = max(top, scores[i])
    scale = np.float32(1.0) / temperature
    total: Any = 0.0
    for block in range(len(greatest)):
        given, made = scores[block * BLOCK : (block + 1) * BLOCK], weights[block * BLOCK : (block + 1) * BLOCK]
        for i in range(BLOCK):
            made[i] = exp((given[i] - top) * scale)  # never below e ** -87, which is less than is ever kept
        most, mass = np.float32(0.0), np.float32(0.0)
        for i in range(BLOCK):
            most = max(most, made[i])
            mass += made[i]
        greatest[block] = most
        total += mass
    return total


@_compiled
def _reached_by(greatest: Any, count: Any) -> Any:
    """A weight that at least `count` tokens reach: so many blocks do, if there are so many."""
    blocks = np.zeros(_BINS, np.int64)
    for block in range(len(greatest)):
        blocks[_bin_of(greatest[block])] += 1
    reached = 0
    for index in range(_BINS - 1, 0, -1):
        reached += blocks[index]
        if reached >= count:
            return np.int32(index << _SHIFT).view(np.float32)
    return np.float32(0.0)


@_compiled
def _possible(weights: Any, greatest: Any, least: Any, keys: Any) -> Any:
    """How many tokens weigh at least `least`, written to `keys`: the weight's bits above the token, from the end.

    Which tokens do is hard to foretell, so that none of them is a branch.
    """
    found = 0
    for block in range(len(greatest)):
        if greatest[block] >= least:
            for i in range(block * BLOCK, (block + 1) * BLOCK):
                keys[found] = (np.int64(np.float32(weights[i]).view(np.int32)) << 32) | (_TOKENS - i)
                found += weights[i] >= least
    return found


@_compiled
def _in_order(keys: Any, index: Any, count: Any) -> Any:
    """The keys of one bin, the likeliest token first, and of equal ones the first in the vocabulary."""
    chosen = np.empty(count + 1, np.int64)
    found = 0
    for key in keys:
        chosen[found] = key
        found += (key >> (32 + _SHIFT)) == index
    return -np.sort(-chosen[:count])


@njit(inline="always")
def _weight_of(key: Any) -> Any:
    return np.float64(np.int32(key >> 32).view(np.float32))


@_compiled
def _prefix(keys: Any, counts: Any, masses: Any, most: Any, reach: Any) -> tuple[Any, Any, Any]:
    """The likeliest tokens until they are `most` or weigh `reach`, one at least: how many, their mass, the last.

    The last is looked up only where the bounds end within a bin.
    """
    kept, mass, last = 0, 0.0, -1
    for index in range(_BINS - 1, -1, -1):
        if counts[index] > 0 and (kept + counts[index] >= most or mass + masses[index] >= reach):
            for key in _in_order(keys, index, counts[index]):
                if kept == most or (mass >= reach and kept > 0):
                    break
                mass += _weight_of(key)
                kept += 1
                last = _TOKENS - (key & _TOKENS)
            break
        kept += counts[index]
        mass += masses[index]
    return kept, mass, last


@_compiled
def _drawn(
    scores: Any, temperature: Any, min_p: Any, top_k: Any, top_p: Any, draw: Any, weights: Any, greatest: Any
) -> Any:
    """One token of one row."""
    total = _weigh(scores, temperature, weights, greatest)
    # 1. Below `least` nothing is kept: by min_p, which this applies, or since the other bounds end above.
    top_p_alone = min_p == 0.0 and top_k == 0
    least = max(np.float32(1e-37), np.float32(max(min_p, (1.0 - top_p) * total / len(scores) if top_p_alone else 0.0)))
    if top_k > 0:
        least = max(least, _reached_by(greatest, top_k))
    room = np.empty(len(scores) + 1, np.int64)
    keys = room[: _possible(weights, greatest, least, room)]
    counts, masses = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.float64)
    for key in keys:
        counts[key >> (32 + _SHIFT)] += 1
        masses[key >> (32 + _SHIFT)] += _weight_of(key)
    # 2. top_k, then top_p's share of what that keeps.
    kept, mass = counts.sum(), masses.sum()
    if top_k > 0:
        kept, mass, _ = _prefix(keys, counts, masses, min(top_k, kept), np.inf)
    if top_p < 1.0:
        reach = top_p * (total if top_p_alone else mass)
        kept, mass, _ = _prefix(keys, counts, masses, kept, reach)
    # 3. The draw: the first token whose running sum is above the target, or the last that is kept.
    target = np.nextafter(draw * mass, np.inf)
    return _prefix(keys, counts, masses, kept, target)[2]


def _draw() -> Loop:
    def draw(
        num_rows: int,  # that draw
        width: int,  # of a row of scores, a multiple of the block
        scores_at: int,  # float32 [.., width]
        rows_at: int,  # int64 [num_rows]: theirs
        weights_at: int,  # float32 [num_rows, width]: room for what is computed
        bounds_at: int,  # float64 [num_rows, 5]: temperature, min_p, top_k (0: none), top_p, the draw in [0, 1)
        tokens_at: int,  # int64 [num_rows, 1]
    ) -> None:
        """One token of each row, among those that `min_p`, then `top_k`, then `top_p` keep.

        Each bound keeps the likeliest; the draw inverts their running sum in falling order.
        """
        rows = carray(pointer(rows_at), (num_rows,), np.int64)
        bounds = carray(pointer(bounds_at), (num_rows, 5), np.float64)
        tokens = carray(pointer(tokens_at), (num_rows, 1), np.int64)
        for n in prange(num_rows):
            scores = carray(pointer(scores_at + rows[n] * width * 4), (width,), np.float32)
            weights = carray(pointer(weights_at + n * width * 4), (width,), np.float32)
            tokens[n, 0] = _drawn(
                scores,
                np.float32(bounds[n, 0]),
                bounds[n, 1],
                np.int64(bounds[n, 2]),
                bounds[n, 3],
                bounds[n, 4],
                weights,
                np.empty(width // BLOCK, np.float32),
            )

    return draw
