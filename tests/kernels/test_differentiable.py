"""Gated activations and norms with gradients: the compiled loops beside float64 autograd, over odd shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from masquerade_kernels.differentiable import attention, gated, norm

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
@example(rows=1, width=1, seed=455)
def test_norm_is_x_by_its_root_mean_square(dtype: torch.dtype, close: float, rows: int, width: int, seed: int) -> None:
    x, weight, upstream = (one.to(dtype) for one in _made(seed, (rows, width), (width,), (rows, width)))

    def exact(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()

    found = _with_gradients(lambda x: norm(x, weight, 1e-5), [x], [dtype], upstream)
    output, gradient = found
    exact_output, exact_gradient = _with_gradients(exact, [x], [torch.float64], upstream)
    largest = max(1.0, float(exact_output.abs().max()))
    torch.testing.assert_close(output, exact_output, rtol=close, atol=close * largest)
    # In a narrow row the gradient is a small difference of terms as large as this, which are rounded.
    terms = upstream.double() * weight.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    largest = max(1.0, float(exact_gradient.abs().max()), float(terms.abs().max()))
    torch.testing.assert_close(gradient, exact_gradient, rtol=close, atol=close * largest)


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


def _exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    return (scale * query @ key.transpose(-1, -2) + bias.to(query.dtype)).softmax(-1) @ value


def _attention_terms(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    upstream: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """What is summed up, by size, in the output and the gradients of query, key and value.

    A query that sees one key alone has no gradient, but for what is left when rounded terms cancel.
    """
    likely = (scale * query @ key.transpose(-1, -2) + bias).softmax(-1)
    of_scores = scale * likely * (upstream @ value.transpose(-1, -2)).abs()
    return (
        likely @ value.abs(),
        of_scores @ key.abs(),
        of_scores.transpose(-1, -2) @ query.abs(),
        likely.transpose(-1, -2) @ upstream.abs(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=25, deadline=None)
@example(batch=1, heads=1, length=2, unseen=0.875, seed=120)  # a query that sees one key
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 33),
    unseen=st.floats(0.0, 0.9),
    seed=st.integers(0, 999),
)
def test_attention_and_its_gradients(
    dtype: torch.dtype, batch: int, heads: int, length: int, unseen: float, seed: int
) -> None:
    keys, head_dim = length + 7, 16
    *inputs, upstream = _made(
        seed, (batch, heads, length, head_dim), *[(batch, heads, keys, head_dim)] * 2, (batch, heads, length, head_dim)
    )
    hidden = torch.rand(batch, 1, length, keys, generator=torch.Generator().manual_seed(seed)) < unseen
    hidden[..., 0] = False
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    rounded = [(one / 2).to(dtype) for one in inputs]
    scale = 0.25
    found = _with_gradients(lambda *these: attention(*these, bias, scale), rounded, [dtype] * 3, upstream.to(dtype))
    exact = _with_gradients(
        lambda *these: _exact_attention(*these, bias, scale), rounded, [torch.float64] * 3, upstream.to(dtype)
    )
    # On the way back scores are bf16 before they are scaled: half a unit in the last place of 16 is 0.03.
    close = 2e-5 if dtype is torch.float32 else 2e-2
    terms = _attention_terms(*(one.double() for one in (*rounded, bias, upstream.to(dtype))), scale)
    for one, other, rounded_terms in zip(found, exact, terms, strict=True):
        assert (one - other).norm() <= close * max(float(other.norm()), float(rounded_terms.norm()))


def test_an_unseen_key_gets_no_gradient() -> None:
    query, key, value, upstream = (one.bfloat16() for one in _made(5, *[(2, 3, 9, 16)] * 4))
    bias = torch.zeros(2, 1, 9, 9, dtype=torch.bfloat16)
    bias[:, :, :, 4] = float("-inf")
    leaves = [one.requires_grad_() for one in (query, key, value)]
    torch.autograd.backward(attention(*leaves, bias, 0.25), upstream)
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert (leaf.grad[:, :, 4] == 0).all()
        assert (leaf.grad[:, :, 3] != 0).any()
