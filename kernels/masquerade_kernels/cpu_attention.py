"""Rotary embedding, the write to the KV cache, and attention of decoding rows, on the CPU: two compiled loops a layer.

One query a row needs no tiles and no mask: each row reads its own slot up to its own length, a KV head's whole group
of query heads at a time, so that every key is read from memory once. 16 rows of 264 keys (9 heads on 3, bf16) take
0.24 ms on one thread; two batched products over padded tiles took 0.28 ms on two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import carray, njit, prange

from masquerade_kernels.cpu_dot_attention import BLOCK, lane_of, score_keys, sum_values, takes
from masquerade_kernels.cpu_dots import has_dot_products
from masquerade_kernels.cpu_values import Loop, by_size, exp, load, pointer, prefetch, stored_as

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_PARALLEL_ROWS = 48  # as for the other loops over rows
_PARALLEL_KEYS = 1500  # (row, KV head, key) triples from which a second thread earns its start
_AHEAD = 32  # keys between what is fetched and what is used: 4 KB, beyond which the hardware looks by itself
_BYTES_AHEAD = 4096  # the same in bytes, where keys are not widened
_BLOCK = 16  # keys widened at a time: 4 KB of float32 at a head dimension of 64


@dataclass(frozen=True, slots=True)
class AttentionLoops:
    """The loops for one dtype and geometry; arguments as at their namesakes below."""

    rotate_store: Loop
    attend: Loop


@functools.cache
def attention_loops(bits: int, head_dim: int, group: int, num_threads: int) -> AttentionLoops:
    """The loops for values of 16 (bf16) or 32 (float32) bits and `group` query heads on each KV head."""
    dtype = np.uint16 if bits == 16 else np.float32
    attend = _attend_in_dots if bits == 16 and takes(head_dim) and has_dot_products() else _attend
    return AttentionLoops(
        by_size(_rotate_store(dtype, head_dim), _PARALLEL_ROWS, num_threads),
        by_size(attend(dtype, head_dim, group), _PARALLEL_KEYS, num_threads),
    )


@njit(inline="always")
def _widen(head_dim: int, rows: Any, rows_at: int, first: int, width: int, block: Any) -> None:
    """`block[k] = rows[first + k]` in float32, for `width` rows; what comes later is fetched ahead."""
    ahead = rows_at + (first + _AHEAD) * head_dim * rows.itemsize
    for line in range(ahead, ahead + _BLOCK * head_dim * rows.itemsize, 64):
        prefetch(line)
    for k in range(width):
        for d in range(head_dim):
            block[k, d] = load(rows[first + k, d])


@njit(inline="always")
def _score(
    group: int, head_dim: int, query: Any, keys: Any, keys_at: int, start: int, stop: int, block: Any, scores: Any
) -> None:
    """`scores[g, k] = query[g] · keys[start + k]`."""
    for first in range(start, stop, _BLOCK):
        width = min(_BLOCK, stop - first)
        _widen(head_dim, keys, keys_at, first, width, block)
        for g in range(group):
            for k in range(width):
                dot = np.float32(0.0)
                for d in range(head_dim):
                    dot += query[g, d] * block[k, d]
                scores[g, first - start + k] = dot


@njit(inline="always")
def _softmax(group: int, scores: Any, num_keys: int) -> None:
    """Over the first `num_keys` of each row, in place; zeros up to the next whole block."""
    for g in range(group):
        top = scores[g, 0]
        for k in range(num_keys):
            top = max(top, scores[g, k])
        total = np.float32(0.0)
        for k in range(num_keys):
            weight = exp(scores[g, k] - top)
            scores[g, k] = weight
            total += weight
        for k in range(num_keys):
            scores[g, k] /= total
        for k in range(num_keys, min(num_keys + _BLOCK, scores.shape[1])):
            scores[g, k] = np.float32(0.0)


@njit(inline="always")
def _sum_values(
    group: int, head_dim: int, weights: Any, values: Any, values_at: int, start: int, stop: int, block: Any, sums: Any
) -> None:
    """`sums[g] += Σ weights[g, k] values[start + k]`, four keys at a time."""
    for first in range(start, stop, _BLOCK):
        width = min(_BLOCK, stop - first)
        _widen(head_dim, values, values_at, first, width, block)
        for k in range(width, _BLOCK):
            for d in range(head_dim):
                block[k, d] = np.float32(0.0)
        for g in range(group):
            for k in range(0, width, 4):
                at = first - start + k
                w0, w1, w2, w3 = weights[g, at], weights[g, at + 1], weights[g, at + 2], weights[g, at + 3]
                for d in range(head_dim):
                    low = w0 * block[k, d] + w1 * block[k + 1, d]
                    sums[g, d] += low + (w2 * block[k + 2, d] + w3 * block[k + 3, d])


def _rotate_store(dtype: DTypeLike, head_dim: int) -> Loop:
    half = head_dim // 2

    def rotate_store(
        num_rows: int,
        num_heads: int,
        num_kv_heads: int,
        qkv_at: int,  # [num_rows, num_heads + 2 num_kv_heads, head_dim]
        cos_at: int,  # float32 [positions, half]
        sin_at: int,
        num_positions: int,
        positions_at: int,  # int64 [num_rows]
        slots_at: int,  # int64 [num_rows]
        keys_at: int,  # [slots, num_kv_heads, max_len, head_dim]
        values_at: int,
        num_slots: int,
        max_len: int,
        query_norm_at: int,  # [head_dim]; 0: this family has none
        key_norm_at: int,
        eps: float,
    ) -> None:
        """Rotate queries in place; rotate keys and put them and the values into their slots."""
        qkv = carray(pointer(qkv_at), (num_rows, num_heads + 2 * num_kv_heads, head_dim), dtype)
        cos = carray(pointer(cos_at), (num_positions, half), np.float32)
        sin = carray(pointer(sin_at), (num_positions, half), np.float32)
        positions = carray(pointer(positions_at), (num_rows,), np.int64)
        slots = carray(pointer(slots_at), (num_rows,), np.int64)
        keys = carray(pointer(keys_at), (num_slots, num_kv_heads, max_len, head_dim), dtype)
        values = carray(pointer(values_at), (num_slots, num_kv_heads, max_len, head_dim), dtype)
        for i in prange(num_rows):
            at, slot = positions[i], slots[i]
            for head in range(num_heads + num_kv_heads):
                is_query = head < num_heads
                norm_at = query_norm_at if is_query else key_norm_at
                if norm_at != 0:
                    weight = carray(pointer(norm_at), (head_dim,), dtype)
                    total = np.float32(0.0)
                    for d in range(head_dim):
                        value = load(qkv[i, head, d])
                        total += value * value
                    scale = np.float32(1.0) / np.sqrt(total / np.float32(head_dim) + np.float32(eps))
                    for d in range(head_dim):
                        normed = load(qkv[i, head, d]) * scale * load(weight[d])
                        qkv[i, head, d] = stored_as(normed, qkv[i, head, d])
                target = qkv[i, head] if is_query else keys[slot, head - num_heads, at]
                for d in range(half):
                    low, high = load(qkv[i, head, d]), load(qkv[i, head, d + half])
                    c, s = cos[at, d], sin[at, d]
                    target[d] = stored_as(low * c - high * s, target[d])
                    target[d + half] = stored_as(high * c + low * s, target[d])
            for head in range(num_kv_heads):
                for d in range(head_dim):
                    values[slot, head, at, d] = qkv[i, num_heads + num_kv_heads + head, d]

    return rotate_store


def _attend(dtype: DTypeLike, head_dim: int, group: int) -> Loop:
    def attend(
        num_keys: int,  # of all rows and KV heads together
        num_rows: int,
        num_heads: int,
        num_kv_heads: int,
        qkv_at: int,  # [num_rows, num_heads + 2 num_kv_heads, head_dim]
        slots_at: int,  # int64 [num_rows]
        lengths_at: int,  # int64 [num_rows]: keys that each row sees, its own included
        max_length: int,  # the longest of them
        order_at: int,  # int64 [num_tasks]: row * num_kv_heads + head, by the thread that takes it
        bounds_at: int,  # int64 [num_threads + 1]: each thread's part of `order`
        num_threads: int,
        keys_at: int,  # [slots, num_kv_heads, max_len, head_dim]
        values_at: int,
        num_slots: int,
        max_len: int,
        window: int,  # 0: none
        scaling: float,
        out_at: int,  # [num_rows, num_heads, head_dim]
    ) -> None:
        """One query a row, for the rows in `order`: softmax(q Kᵀ scaling) V, a KV head's whole group at a time."""
        qkv = carray(pointer(qkv_at), (num_rows, num_heads + 2 * num_kv_heads, head_dim), dtype)
        out = carray(pointer(out_at), (num_rows, num_heads, head_dim), dtype)
        slots = carray(pointer(slots_at), (num_rows,), np.int64)
        lengths = carray(pointer(lengths_at), (num_rows,), np.int64)
        bounds = carray(pointer(bounds_at), (num_threads + 1,), np.int64)
        order = carray(pointer(order_at), (bounds[num_threads],), np.int64)
        keys = carray(pointer(keys_at), (num_slots, num_kv_heads, max_len, head_dim), dtype)
        values = carray(pointer(values_at), (num_slots, num_kv_heads, max_len, head_dim), dtype)
        for thread in prange(num_threads):
            scores = np.empty((group, max_length + _BLOCK), np.float32)
            query = np.empty((group, head_dim), np.float32)
            block = np.empty((_BLOCK, head_dim), np.float32)
            sums = np.empty((group, head_dim), np.float32)
            for task in range(bounds[thread], bounds[thread + 1]):
                row, head = order[task] // num_kv_heads, order[task] % num_kv_heads
                stop = lengths[row]
                start = max(0, stop - window) if window > 0 else 0
                own_keys, own_values = keys[slots[row], head], values[slots[row], head]
                own = (slots[row] * num_kv_heads + head) * max_len * head_dim * keys.itemsize  # bytes into both
                for g in range(group):
                    for d in range(head_dim):
                        query[g, d] = load(qkv[row, head * group + g, d]) * np.float32(scaling)
                        sums[g, d] = np.float32(0.0)
                _score(group, head_dim, query, own_keys, keys_at + own, start, stop, block, scores)
                _softmax(group, scores, stop - start)
                _sum_values(group, head_dim, scores, own_values, values_at + own, start, stop, block, sums)
                for g in range(group):
                    for d in range(head_dim):
                        out[row, head * group + g, d] = stored_as(sums[g, d], out[row, head * group + g, d])

    return attend


@njit(inline="always")
def _soon(key: int, stop: int, key_bytes: int, here: int, then: int) -> int:
    """The address of a key that comes later: in this stream, or as far into the next."""
    return here + key * key_bytes if key < stop else then + (key - stop) * key_bytes


def _attend_in_dots(dtype: DTypeLike, head_dim: int, group: int) -> Loop:
    """As `_attend`, on bf16 dot products; weights are rounded to bf16 before the values are summed."""
    lanes = np.array(lane_of(head_dim))
    key_bytes, ahead = head_dim * 2, _BYTES_AHEAD // (head_dim * 2)

    def attend_in_dots(
        num_keys: int,
        num_rows: int,
        num_heads: int,
        num_kv_heads: int,
        qkv_at: int,
        slots_at: int,
        lengths_at: int,
        max_length: int,
        order_at: int,
        bounds_at: int,
        num_threads: int,
        keys_at: int,
        values_at: int,
        num_slots: int,
        max_len: int,
        window: int,
        scaling: float,
        out_at: int,
    ) -> None:
        """One query a row, for the rows in `order`; arguments are those of `attend`."""
        out = carray(pointer(out_at), (num_rows, num_heads, head_dim), dtype)
        slots = carray(pointer(slots_at), (num_rows,), np.int64)
        lengths = carray(pointer(lengths_at), (num_rows,), np.int64)
        bounds = carray(pointer(bounds_at), (num_threads + 1,), np.int64)
        order = carray(pointer(order_at), (bounds[num_threads],), np.int64)
        for thread in prange(num_threads):
            scores = np.empty((group, max_length + BLOCK), np.float32)
            weights = np.empty((group, max_length + BLOCK), np.uint16)
            sums = np.empty((group, head_dim), np.float32)
            for task in range(bounds[thread], bounds[thread + 1]):
                row, head = order[task] // num_kv_heads, order[task] % num_kv_heads
                stop = lengths[row]
                start = max(0, stop - window) if window > 0 else 0
                query_at = qkv_at + (row * (num_heads + 2 * num_kv_heads) + head * group) * head_dim * 2
                own = (slots[row] * num_kv_heads + head) * max_len * key_bytes  # into both
                # What is read: these keys, these values, and the next task's keys; each is fetched while the one
                # before is used.
                following = order[min(task + 1, bounds[thread + 1] - 1)]
                next_slot = slots[following // num_kv_heads] * num_kv_heads + following % num_kv_heads
                streams = (keys_at + own, values_at + own, keys_at + next_slot * max_len * key_bytes)
                for first in range(start, stop, BLOCK):
                    at = scores.ctypes.data + (first - start) * 4
                    soon = _soon(first + ahead, stop, key_bytes, streams[0], streams[1] + start * key_bytes)
                    score_keys(
                        group,
                        head_dim,
                        query_at,
                        keys_at + own,
                        first,
                        stop,
                        np.float32(scaling),
                        at,
                        scores.strides[0],
                        soon,
                    )
                _softmax(group, scores, stop - start)
                for g in range(group):
                    for k in range(min(stop - start + BLOCK, scores.shape[1])):
                        weights[g, k] = stored_as(scores[g, k], weights[g, k])
                    for d in range(head_dim):
                        sums[g, d] = np.float32(0.0)
                for first in range(start, stop, BLOCK):
                    at = weights.ctypes.data + (first - start) * 2
                    soon = _soon(first + ahead, stop, key_bytes, streams[1], streams[2])
                    sum_values(
                        group, head_dim, at, weights.strides[0], values_at + own, first, stop, sums.ctypes.data, soon
                    )
                for g in range(group):
                    for d in range(head_dim):
                        out[row, head * group + g, d] = stored_as(sums[g, lanes[d]], out[row, head * group + g, d])

    return attend_in_dots
