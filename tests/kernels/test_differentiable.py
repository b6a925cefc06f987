"""Gated activations and norms with gradients: the compiled loops beside float64 autograd, over odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from masquerade_kernels.differentiable import gated, norm

Made = list[torch.Tensor]


def _made(seed: int, *shapes: tuple[int, ...]) -> Made:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def _with_gradients(
    function: Callable[..., torch.Tensor], inputs: Made, dtypes: list[torch.dtype], upstream: torch.Tensor
) -> Made:
    """The output and every input's gradient, in float64."""
    leaves = [one.to(dtype, copy=True).requires_grad_() for one, dtype in zip(inputs, dtypes, strict=True)]
    out = function(*leaves)
    torch.autograd.backward(out, upstream.to(out.dtype))
    return [one.detach().double() for one in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def _exact_gated(gate: torch.Tensor, up: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up * coefficients


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(1, 67), seed=st.integers(0, 999))
def test_gated_is_silu_times_up_times_coefficients(
    dtype: torch.dtype, close: float, rows: int, width: int, seed: int
) -> None:
    *inputs, upstream = _made(seed, (rows, width), (rows, width), (width,), (rows, width))
    rounded = [inputs[0].to(dtype), inputs[1].to(dtype), inputs[2], upstream.to(dtype)]
    found = _with_gradients(gated, rounded[:3], [dtype, dtype, torch.float32], rounded[3])
    exact = _with_gradients(_exact_gated, rounded[:3], [torch.float64] * 3, rounded[3])
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_coefficients_are_ones(dtype: torch.dtype) -> None:
    gate, up = (one.to(dtype) for one in _made(0, (2, 5, 24), (2, 5, 24)))
    close = {torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(gated(gate, up), gated(gate, up, torch.ones(24)), atol=close, rtol=close)


def test_a_dropped_neuron_still_tells_what_keeping_it_would_change() -> None:
    gate, up, upstream = _made(1, (9, 8), (9, 8), (9, 8))
    mask = torch.tensor([1.0, 0.0] * 4, requires_grad=True)
    leaf = gate.clone().requires_grad_()
    torch.autograd.backward(gated(leaf, up, mask), upstream)
    assert mask.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(mask.grad, (upstream * F.silu(gate) * up).sum(0))
    assert (leaf.grad[:, 1::2] == 0).all()


def test_the_coefficients_gradient_is_the_same_to_the_bit_on_one_thread_and_on_two() -> None:
    inputs = [one.bfloat16() for one in _made(2, (200, 96), (200, 96), (96,), (200, 96))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kinds = [torch.bfloat16, torch.bfloat16, torch.float32]
            found.append(_with_gradients(gated, inputs[:3], kinds, inputs[3]))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(1, 67), seed=st.integers(0, 999))
def test_norm_is_x_by_its_root_mean_square(dtype: torch.dtype, close: float, rows: int, width: int, seed: int) -> None:
    x, weight, upstream = (one.to(dtype) for one in _made(seed, (rows, width), (width,), (rows, width)))

    def exact(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    found = _with_gradients(lambda x: norm(x, weight, 1e-5), [x], [dtype], upstream)
    for one, other in zip(found, _with_gradients(exact, [x], [torch.float64], upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close * max(1.0, float(other.abs().max())))


def test_gradients_may_come_in_any_layout() -> None:
    gate, up = _made(3, (6, 5, 8), (6, 5, 8))
    x, weight = _made(4, (6, 5, 8), (8,))
    upstream = torch.randn(8, 5, 6).permute(2, 1, 0)
    for function, inputs in ((gated, [gate, up]), (lambda x: norm(x, weight, 1e-5), [x])):
        kinds = [torch.float32] * len(inputs)
        found = _with_gradients(function, inputs, kinds, upstream)
        wanted = _with_gradients(function, inputs, kinds, upstream.contiguous())
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
