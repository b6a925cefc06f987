"""The persona FFN's activation, the RMS norm and attention with gradients: what learning runs between linear layers.

A compiled loop each way on the CPU in bf16 and float32, plain torch elsewhere. Sums and products are float32 and
rounded once; weights of norms are frozen and get no gradient. Of attention only the way back in bf16 is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def gated(gate: torch.Tensor, up: torch.Tensor, coefficients: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up * coefficients`: `[..., num_neurons]` twice and `[num_neurons]` of any float type."""
    if _has_loops(gate):
        if coefficients is None:
            coefficients = torch.ones(gate.shape[-1])
        looped: torch.Tensor = _Gated.apply(gate, up, coefficients.float())  # type: ignore[no-untyped-call]
        return looped
    activated = F.silu(gate) * up
    if coefficients is None:
        return activated
    scaled: torch.Tensor = _Scaled.apply(activated, coefficients)  # type: ignore[no-untyped-call]
    return scaled


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last dimension."""
    if _has_loops(x):
        looped: torch.Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return looped
    # As transformers' LlamaRMSNorm: rounded before the weight as well.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def attention(
    query: torch.Tensor,  # [batch, heads, length, head_dim]
    key: torch.Tensor,  # [batch, heads, keys, head_dim]
    value: torch.Tensor,
    bias: torch.Tensor,  # [batch, 1, length, keys], added to the scores; no row is all -inf
    scale: float,
) -> torch.Tensor:
    """`softmax(scale * query @ key.T + bias) @ value`.

    In bf16 on the CPU the way back is products and a loop, since torch's own takes twice as long, both ways together
    (benchmarks/learning_loops.py). Gradients are within 0.5 % of the exact ones, since scores are bf16, and torch's
    within 0.4 %.
    """
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and torch.is_grad_enabled():
        looped: torch.Tensor = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
        return looped
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _has_loops(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)


def _rows(x: torch.Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // width, width


def _loops(x: torch.Tensor) -> Any:
    from masquerade_kernels.cpu_gradients import gradient_loops  # noqa: PLC0415  (numba: a second that CUDA needs not)

    return gradient_loops(8 * x.dtype.itemsize, torch.get_num_threads())


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, coefficients):  # type: ignore[no-untyped-def]
        gate, up, coefficients = gate.contiguous(), up.contiguous(), coefficients.contiguous()
        ctx.save_for_backward(gate, up, coefficients)
        out = torch.empty_like(gate)
        _loops(gate).gated(*_rows(gate), gate.data_ptr(), up.data_ptr(), coefficients.data_ptr(), out.data_ptr())
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        from masquerade_kernels.cpu_gradients import CHUNKS  # noqa: PLC0415

        inputs = (*ctx.saved_tensors, gradient.contiguous())
        of_gate, of_up = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
        sums = torch.empty(CHUNKS, gradient.shape[-1])
        addresses = (one.data_ptr() for one in (*inputs, of_gate, of_up, sums))
        _loops(gradient).gated_backward(*_rows(gradient), *addresses)
        return of_gate, of_up, sums.sum(0)


class _Scaled(torch.autograd.Function):
    """`activations * coefficients`, with the coefficients' gradient summed over rows in float32 or wider."""

    @staticmethod
    def forward(ctx, activations, coefficients):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(activations, coefficients)
        wide = torch.promote_types(coefficients.dtype, torch.float32)
        return (activations.to(wide) * coefficients).to(activations.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        activations, coefficients = ctx.saved_tensors
        wide = torch.promote_types(coefficients.dtype, torch.float32)
        of_coefficients = (gradient * activations).flatten(0, -2).sum(0, dtype=wide).to(coefficients.dtype)
        return (gradient.to(wide) * coefficients).to(gradient.dtype), of_coefficients


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        from masquerade_kernels.cpu_rows import row_loops  # noqa: PLC0415

        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty_like(x)
        loops = row_loops(8 * x.dtype.itemsize, torch.get_num_threads())
        loops.norm(*_rows(x), x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        gradient, out = gradient.contiguous(), torch.empty_like(x)
        addresses = (x.data_ptr(), weight.data_ptr(), ctx.eps, gradient.data_ptr(), out.data_ptr())
        _loops(x).norm_backward(*_rows(x), *addresses)
        return out, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, scale):  # type: ignore[no-untyped-def]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        ctx.save_for_backward(query, key, value, bias, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        from masquerade_kernels.cpu_gradients import attention_backward_loop  # noqa: PLC0415

        query, key, value, bias, out, log_sums = ctx.saved_tensors
        batch, heads, length, head_dim = query.shape
        probabilities = query @ key.transpose(-1, -2)  # scores so far
        of_scores = gradient @ value.transpose(-1, -2)  # of the probabilities so far
        inputs = [one.contiguous() for one in (bias, log_sums, out, gradient)]
        sizes = (batch * heads * length, heads, length, key.shape[2], head_dim)
        addresses = (one.data_ptr() for one in (*inputs, probabilities, of_scores))
        attention_backward_loop(torch.get_num_threads())(*sizes, *addresses, ctx.scale)
        of_key = of_scores.transpose(-1, -2) @ query
        return of_scores @ key, of_key, probabilities.transpose(-1, -2) @ gradient, None, None
