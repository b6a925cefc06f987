"""Rows to int8 and back, on the CPU: what stands around oneDNN's int8 product."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import carray, prange

from masquerade_kernels.cpu_values import Loop, by_size, load, pointer, stored_as

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_PARALLEL_ROWS = 48  # as for the other loops over rows


@dataclass(frozen=True, slots=True)
class Int8Loops:
    """The loops for one dtype; arguments as at their namesakes below."""

    quantise: Loop
    rescale: Loop


@functools.cache
def int8_loops(bits: int, num_threads: int) -> Int8Loops:
    """The loops for values of 16 (bf16) or 32 (float32) bits."""
    dtype = np.uint16 if bits == 16 else np.float32
    return Int8Loops(*(by_size(make(dtype), _PARALLEL_ROWS, num_threads) for make in (_quantise, _rescale)))


def _quantise(dtype: DTypeLike) -> Loop:
    def quantise(num_rows: int, width: int, x_at: int, out_at: int, scales_at: int) -> None:
        """`x = scale * (high + low / 254)`: two int8 rows for one, the high ones first, stored from 1 to 255."""
        x = carray(pointer(x_at), (num_rows, width), dtype)
        out = carray(pointer(out_at), (2 * num_rows, width), np.uint8)
        # Two dimensions: numba 0.68 loses a parallel loop's writes to a vector that its own index alone addresses.
        scales = carray(pointer(scales_at), (num_rows, 1), np.float32)
        for i in prange(num_rows):
            top = np.float32(1e-12)
            for d in range(width):
                top = max(top, abs(load(x[i, d])))
            scales[i, 0] = top / np.float32(127.0)
            factor = np.float32(127.0) / top
            for d in range(width):
                value = load(x[i, d]) * factor
                high = np.int32(value + np.float32(128.5)) - np.int32(128)
                low = np.int32((value - np.float32(high)) * np.float32(254.0) + np.float32(128.5))
                out[i, d] = np.uint8(high + np.int32(128))
                out[num_rows + i, d] = np.uint8(low)

    return quantise


def _rescale(dtype: DTypeLike) -> Loop:
    def rescale(num_rows: int, width: int, products_at: int, scales_at: int, bias_at: int, out_at: int) -> None:
        """`out = scale * (high + low / 254) + bias` from the products of both rows; `bias_at` 0: none."""
        products = carray(pointer(products_at), (2 * num_rows, width), dtype)
        scales = carray(pointer(scales_at), (num_rows,), np.float32)
        bias = carray(pointer(bias_at), (width,), np.float32)
        out = carray(pointer(out_at), (num_rows, width), dtype)
        for i in prange(num_rows):
            scale = scales[i]
            low_scale = scale / np.float32(254.0)
            if bias_at == 0:
                for d in range(width):
                    value = load(products[i, d]) * scale + load(products[num_rows + i, d]) * low_scale
                    out[i, d] = stored_as(value, out[i, d])
            else:
                for d in range(width):
                    value = load(products[i, d]) * scale + load(products[num_rows + i, d]) * low_scale
                    out[i, d] = stored_as(value + bias[d], out[i, d])

    return rescale
