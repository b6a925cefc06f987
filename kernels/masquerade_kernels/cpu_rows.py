"""What a step does to its rows between two linear layers, on the CPU: one compiled loop instead of ten torch ops."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import carray, prange

from masquerade_kernels.cpu_values import Loop, by_size, exp, load, pointer, stored_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import DTypeLike

# Rows from which a second thread earns its start: 32 rows of 576 take 5 us on one, and starting another takes as long.
_PARALLEL_ROWS = 48


@dataclass(frozen=True, slots=True)
class RowLoops:
    """The loops for one dtype; arguments as at their namesakes below."""

    norm: Loop
    add_norm: Loop
    swiglu: Loop


@functools.cache
def row_loops(bits: int, num_threads: int) -> RowLoops:
    """The loops for values of 16 (bf16) or 32 (float32) bits."""
    return RowLoops(*over_rows((_norm, _add_norm, _swiglu), bits, num_threads))


def over_rows(makers: Iterable[Callable[[DTypeLike], Loop]], bits: int, num_threads: int) -> list[Loop]:
    """Loops whose first argument is a number of rows, for values of 16 (bf16) or 32 (float32) bits."""
    dtype = np.uint16 if bits == 16 else np.float32
    return [by_size(make(dtype), _PARALLEL_ROWS, num_threads) for make in makers]


def _norm(dtype: DTypeLike) -> Loop:
    def norm(num_rows: int, hidden: int, x_at: int, weight_at: int, eps: float, out_at: int) -> None:
        """`out = x / rms(x) * weight`, rows of `hidden`."""
        x = carray(pointer(x_at), (num_rows, hidden), dtype)
        out = carray(pointer(out_at), (num_rows, hidden), dtype)
        weight = carray(pointer(weight_at), (hidden,), dtype)
        for i in prange(num_rows):
            total = np.float32(0.0)
            for d in range(hidden):
                value = load(x[i, d])
                total += value * value
            scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + np.float32(eps))
            for d in range(hidden):
                out[i, d] = stored_as(load(x[i, d]) * scale * load(weight[d]), out[i, d])

    return norm


def _add_norm(dtype: DTypeLike) -> Loop:
    def add_norm(num_rows: int, hidden: int, x_at: int, delta_at: int, weight_at: int, eps: float, out_at: int) -> None:
        """`x += delta`, then `out = x / rms(x) * weight`."""
        x = carray(pointer(x_at), (num_rows, hidden), dtype)
        delta = carray(pointer(delta_at), (num_rows, hidden), dtype)
        out = carray(pointer(out_at), (num_rows, hidden), dtype)
        weight = carray(pointer(weight_at), (hidden,), dtype)
        for i in prange(num_rows):
            total = np.float32(0.0)
            for d in range(hidden):
                rounded = stored_as(load(x[i, d]) + load(delta[i, d]), x[i, d])
                x[i, d] = rounded
                value = load(rounded)
                total += value * value
            scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + np.float32(eps))
            for d in range(hidden):
                out[i, d] = stored_as(load(x[i, d]) * scale * load(weight[d]), out[i, d])

    return add_norm


def _swiglu(dtype: DTypeLike) -> Loop:
    def swiglu(
        num_rows: int,
        num_neurons: int,
        gate_up_at: int,  # [num_rows, 2 num_neurons]: the gates first
        coefficients_at: int,  # float32 [num_personas, num_neurons]; 0: all of them 1
        num_personas: int,
        personas_at: int,  # int64 [num_rows]: rows of `coefficients`
        out_at: int,  # [num_rows, num_neurons]
    ) -> None:
        """`silu(gate) * up * coefficient`, rounded once."""
        gate_up = carray(pointer(gate_up_at), (num_rows, 2 * num_neurons), dtype)
        out = carray(pointer(out_at), (num_rows, num_neurons), dtype)
        coefficients = carray(pointer(coefficients_at), (num_personas, num_neurons), np.float32)
        personas = carray(pointer(personas_at), (num_rows,), np.int64)
        for i in prange(num_rows):
            if coefficients_at == 0:
                for d in range(num_neurons):
                    gate = load(gate_up[i, d])
                    value = gate / (np.float32(1.0) + exp(-gate)) * load(gate_up[i, num_neurons + d])
                    out[i, d] = stored_as(value, out[i, d])
            else:
                own = coefficients[personas[i]]
                for d in range(num_neurons):
                    gate = load(gate_up[i, d])
                    value = gate / (np.float32(1.0) + exp(-gate)) * load(gate_up[i, num_neurons + d])
                    out[i, d] = stored_as(value * own[d], out[i, d])

    return swiglu
