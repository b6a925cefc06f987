"""What learning does to its rows between two linear layers, on the CPU: one compiled loop each way."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import carray, prange

from masquerade_kernels.cpu_rows import over_rows
from masquerade_kernels.cpu_values import Loop, exp, load, pointer, stored_as

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

CHUNKS = 16  # of rows, summed one by one: as many on every machine, so that sums are the same to the bit


@dataclass(frozen=True, slots=True)
class GradientLoops:
    """The loops for one dtype; arguments as at their namesakes below."""

    norm_backward: Loop
    gated: Loop
    gated_backward: Loop


@functools.cache
def gradient_loops(bits: int, num_threads: int) -> GradientLoops:
    """The loops for values of 16 (bf16) or 32 (float32) bits."""
    return GradientLoops(*over_rows((_norm_backward, _gated, _gated_backward), bits, num_threads))


@functools.cache
def attention_backward_loop(num_threads: int) -> Loop:
    """For bf16 alone: in float32 torch's own backward pass is the faster one. Arguments as at its namesake below."""
    (loop,) = over_rows((_attention_backward,), 16, num_threads)
    return loop


def _norm_backward(dtype: DTypeLike) -> Loop:
    def norm_backward(
        num_rows: int, hidden: int, x_at: int, weight_at: int, eps: float, gradient_at: int, out_at: int
    ) -> None:
        """The gradient in `x` of `x / rms(x) * weight`, rows of `hidden`."""
        x = carray(pointer(x_at), (num_rows, hidden), dtype)
        gradient = carray(pointer(gradient_at), (num_rows, hidden), dtype)
        out = carray(pointer(out_at), (num_rows, hidden), dtype)
        weight = carray(pointer(weight_at), (hidden,), dtype)
        for i in prange(num_rows):
            total, along = np.float32(0.0), np.float32(0.0)
            for d in range(hidden):
                value = load(x[i, d])
                total += value * value
                along += value * load(weight[d]) * load(gradient[i, d])
            scale = np.float32(1.0) / np.sqrt(total / np.float32(hidden) + np.float32(eps))
            back = along * scale * scale * scale / np.float32(hidden)
            for d in range(hidden):
                value = load(weight[d]) * load(gradient[i, d]) * scale - load(x[i, d]) * back
                out[i, d] = stored_as(value, out[i, d])

    return norm_backward


def _gated(dtype: DTypeLike) -> Loop:
    def gated(num_rows: int, num_neurons: int, gate_at: int, up_at: int, coefficients_at: int, out_at: int) -> None:
        """`silu(gate) * up * coefficient`, rounded once; coefficients are float32 `[num_neurons]`."""
        gates = carray(pointer(gate_at), (num_rows, num_neurons), dtype)
        ups = carray(pointer(up_at), (num_rows, num_neurons), dtype)
        out = carray(pointer(out_at), (num_rows, num_neurons), dtype)
        coefficients = carray(pointer(coefficients_at), (num_neurons,), np.float32)
        for i in prange(num_rows):
            for d in range(num_neurons):
                gate = load(gates[i, d])
                value = gate / (np.float32(1.0) + exp(-gate)) * load(ups[i, d]) * coefficients[d]
                out[i, d] = stored_as(value, out[i, d])

    return gated


def _gated_backward(dtype: DTypeLike) -> Loop:
    def gated_backward(
        num_rows: int,
        num_neurons: int,
        gate_at: int,
        up_at: int,
        coefficients_at: int,  # float32 [num_neurons]
        gradient_at: int,  # of `gated`'s outputs
        gate_gradient_at: int,
        up_gradient_at: int,
        sums_at: int,  # float32 [CHUNKS, num_neurons]: the coefficients' gradient, by chunk of rows
    ) -> None:
        """The gradients of `gated` in all that goes into it."""
        gates = carray(pointer(gate_at), (num_rows, num_neurons), dtype)
        ups = carray(pointer(up_at), (num_rows, num_neurons), dtype)
        gradients = carray(pointer(gradient_at), (num_rows, num_neurons), dtype)
        gate_gradients = carray(pointer(gate_gradient_at), (num_rows, num_neurons), dtype)
        up_gradients = carray(pointer(up_gradient_at), (num_rows, num_neurons), dtype)
        coefficients = carray(pointer(coefficients_at), (num_neurons,), np.float32)
        sums = carray(pointer(sums_at), (CHUNKS, num_neurons), np.float32)
        for chunk in prange(CHUNKS):
            for d in range(num_neurons):
                sums[chunk, d] = np.float32(0.0)
            for i in range(chunk * num_rows // CHUNKS, (chunk + 1) * num_rows // CHUNKS):
                for d in range(num_neurons):
                    gate, up, gradient = load(gates[i, d]), load(ups[i, d]), load(gradients[i, d])
                    likely = np.float32(1.0) / (np.float32(1.0) + exp(-gate))
                    activated = gate * likely
                    sums[chunk, d] += gradient * activated * up
                    weighed = gradient * coefficients[d]
                    slope = likely * (np.float32(1.0) + gate * (np.float32(1.0) - likely))
                    gate_gradients[i, d] = stored_as(weighed * up * slope, gate_gradients[i, d])
                    up_gradients[i, d] = stored_as(weighed * activated, up_gradients[i, d])

    return gated_backward


def _attention_backward(dtype: DTypeLike) -> Loop:
    def attention_backward(
        num_rows: int,  # batch * heads * length
        heads: int,
        length: int,
        keys: int,
        head_dim: int,
        bias_at: int,  # [batch, length, keys]
        log_sums_at: int,  # float32 [num_rows]: log of the sum of the exponentials
        out_at: int,  # [num_rows, head_dim]
        gradient_at: int,  # of that
        scores_at: int,  # [num_rows, keys], without scale and bias; the probabilities take their place
        gradients_at: int,  # [num_rows, keys], of the probabilities; those of the scores take their place
        scale: float,
    ) -> None:
        """What lies between attention's matrix products on the way back (Dao et al., arXiv 2205.14135, algorithm 4)."""
        biases = carray(pointer(bias_at), (num_rows // heads, keys), dtype)
        log_sums = carray(pointer(log_sums_at), (num_rows,), np.float32)
        out = carray(pointer(out_at), (num_rows, head_dim), dtype)
        gradient = carray(pointer(gradient_at), (num_rows, head_dim), dtype)
        scores = carray(pointer(scores_at), (num_rows, keys), dtype)
        gradients = carray(pointer(gradients_at), (num_rows, keys), dtype)
        for i in prange(num_rows):
            along = np.float32(0.0)
            for d in range(head_dim):
                along += load(out[i, d]) * load(gradient[i, d])
            at = i // (heads * length) * length + i % length
            for d in range(keys):
                logarithm = load(scores[i, d]) * np.float32(scale) + load(biases[at, d]) - log_sums[i]
                # Denormal numbers would be slow here, and slower in the products.
                likely = exp(logarithm) if logarithm > np.float32(-60.0) else np.float32(0.0)
                value = likely * (load(gradients[i, d]) - along) * np.float32(scale)
                scores[i, d] = stored_as(likely, scores[i, d])
                gradients[i, d] = stored_as(value, gradients[i, d])

    return attention_backward
