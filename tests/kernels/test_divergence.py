"""Divergence of logits and its gradient: the compiled loops beside float64 torch, over odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from masquerade_kernels.divergence import divergence, divergence_and_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _logits(seed: int, rows: int, vocabulary: int, dtype: torch.dtype, spread: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype) for _ in range(2)]


def _exact(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    wanted, given = (one.double().log_softmax(-1) for one in (target, predicted))
    return F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), vocabulary=st.integers(1, 131), seed=st.integers(0, 999))
def test_it_is_the_kl_of_the_softmaxes(dtype: torch.dtype, rows: int, vocabulary: int, seed: int) -> None:
    target, predicted = _logits(seed, rows, vocabulary, dtype)
    torch.testing.assert_close(
        divergence(target, predicted)[0].double(), _exact(target, predicted), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), vocabulary=st.integers(1, 131), seed=st.integers(0, 999))
def test_the_gradient_is_that_of_the_weighted_sum(dtype: torch.dtype, rows: int, vocabulary: int, seed: int) -> None:
    target, predicted = _logits(seed, rows, vocabulary, dtype)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    leaf = predicted.double().requires_grad_()
    expected = _exact(target, leaf)
    torch.autograd.backward((expected * weights).sum())
    assert leaf.grad is not None
    kl, gradient = divergence_and_gradient(target, predicted, weights)
    torch.testing.assert_close(kl.double(), expected.detach(), atol=2e-5, rtol=1e-5)
    # bf16 rounds once: half a unit in the last place is 2^-9 of a value.
    close = 2**-8 if dtype is torch.bfloat16 else 1e-5
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-6, rtol=close)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), vocabulary=st.integers(1, 131), seed=st.integers(0, 999))
def test_tops_agree_where_the_first_highest_does(dtype: torch.dtype, rows: int, vocabulary: int, seed: int) -> None:
    # A few values only, so that rows have several tops.
    target, predicted = (one.round() for one in _logits(seed, rows, vocabulary, dtype, spread=1.0))
    first = [(one == one.amax(-1, keepdim=True)).int().argmax(-1) for one in (target, predicted)]
    assert torch.equal(divergence(target, predicted)[1], first[0] == first[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_and_equal_ones(dtype: torch.dtype) -> None:
    target, predicted = _logits(0, 3, 40, dtype, spread=300.0)
    found = divergence(target, predicted)[0].double()
    torch.testing.assert_close(found, _exact(target, predicted), rtol=1e-5, atol=1e-3)
    assert divergence(target, target)[0].abs().max() < 1e-5
    kl, gradient = divergence_and_gradient(target, target.clone(), torch.ones(3))
    assert kl.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_of_other_tensors_are_read_where_they_lie(dtype: torch.dtype) -> None:
    target, predicted = (one.T for one in _logits(1, 24, 9, dtype))
    for one, other in zip(
        divergence(target, predicted), divergence(target.clone(), predicted.contiguous()), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_on_one_thread_and_on_two(dtype: torch.dtype, threads: int) -> None:
    """Sums may be taken in another order there, so that their last bits differ."""
    target, predicted = _logits(2, 130, 301, dtype)
    weights = torch.rand(130, generator=torch.Generator().manual_seed(2))
    likely, wanted = (one.double().softmax(-1) for one in (predicted, target))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        kl, agree = divergence(target, predicted)
        again, gradient = divergence_and_gradient(target, predicted.clone(), weights)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(kl.double(), _exact(target, predicted), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(again, kl, atol=2e-5, rtol=1e-5)
    assert torch.equal(agree, target.argmax(-1) == predicted.argmax(-1))
    expected = weights.double()[:, None] * (likely - wanted)
    close = 2**-8 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=close)
