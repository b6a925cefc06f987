from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from masquerade_kernels import PackedLinear
from masquerade_kernels.linear import DotLinear, Int8Linear, can_dot, pack_linear, padded_rows

DOTS = can_dot(torch.zeros(16, 16).bfloat16())
DOT_LINEARS = [partial(DotLinear, products=dtype) for dtype in (torch.bfloat16, torch.float32)] if DOTS else []
BF16_LINEARS: list[Callable[..., PackedLinear | DotLinear]] = [PackedLinear, *DOT_LINEARS]


@pytest.mark.parametrize("linear", BF16_LINEARS)
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 200])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 32), (77, 46), (1, 6), (130, 96), (600, 1024)])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_the_rounded_float64_product(
    linear: Callable[..., PackedLinear | DotLinear], rows: int, out_features: int, in_features: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    x = torch.randn(rows, in_features, generator=generator).bfloat16()
    b = torch.randn(out_features, generator=generator).bfloat16() if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    # float32 accumulation and one rounding to bf16, whose spacing is 2^-8 of the value; half of it, doubled for the
    # rounding of a product beside its bias.
    scale = exact.abs() + (x.double().abs() @ weight.double().abs().T) * 2**-16
    assert ((linear(weight, b)(x).double() - exact).abs() <= scale * 2**-8).all()


def test_an_odd_number_of_inputs_is_computed_too() -> None:
    weight, x = torch.randn(77, 45).bfloat16(), torch.randn(3, 45).bfloat16()
    assert not can_dot(weight)
    torch.testing.assert_close(pack_linear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("others", [1, 2, 7, 15, 16, 40])
def test_a_row_is_the_same_to_the_bit_in_any_batch(others: int) -> None:
    weight, x = torch.randn(600, 1024).bfloat16(), torch.randn(1 + others, 1024).bfloat16()
    for kind in DOT_LINEARS:
        linear = kind(weight)
        assert torch.equal(linear(x)[-1:], linear(x[-1:]))


def test_rows_need_not_be_contiguous() -> None:
    weight, x = torch.randn(48, 32).bfloat16(), torch.randn(32, 5).bfloat16()
    for linear in BF16_LINEARS:
        torch.testing.assert_close(linear(weight)(x.T), F.linear(x.T, weight))


def test_the_threads_are_those_of_the_caller() -> None:
    weight, x = torch.randn(600, 1024).bfloat16(), torch.randn(9, 1024).bfloat16()
    linear = pack_linear(weight)
    together = linear(x)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(linear(x), together)
    finally:
        torch.set_num_threads(num_threads)


def test_float32_is_the_plain_linear() -> None:
    weight, x = torch.randn(31, 17), torch.randn(19, 17)
    linear = PackedLinear(weight)
    assert not linear.packed
    assert torch.equal(linear(x), F.linear(x, weight))


@pytest.mark.parametrize(
    ("rows", "computed"), [(1, 1), (16, 16), (17, 24), (64, 64), (65, 80), (256, 256), (257, 288), (10_000, 10_016)]
)
def test_rows_are_counted_in_steps(rows: int, computed: int) -> None:
    assert padded_rows(rows) == computed


@pytest.mark.parametrize("linear", BF16_LINEARS)
def test_no_rows_are_no_rows(linear: Callable[..., PackedLinear | DotLinear]) -> None:
    assert linear(torch.randn(24, 16).bfloat16())(torch.empty(0, 16).bfloat16()).shape == (0, 24)


@pytest.mark.parametrize("linear", BF16_LINEARS)
def test_another_dtype_is_our_own_mistake(linear: Callable[..., PackedLinear | DotLinear]) -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        linear(torch.randn(8, 8).bfloat16())(torch.randn(1, 8))


@pytest.mark.parametrize("linear", BF16_LINEARS)
def test_bytes_are_those_of_the_weight(linear: Callable[..., PackedLinear | DotLinear]) -> None:
    assert linear(torch.randn(32, 16).bfloat16()).num_bytes == 32 * 16 * 2


def test_every_weight_gets_the_fastest_linear_that_takes_it() -> None:
    weight = torch.randn(16, 16)
    assert type(pack_linear(weight)) is PackedLinear
    assert type(pack_linear(weight.bfloat16())) is (DotLinear if DOTS else PackedLinear)
    assert type(pack_linear(weight, int8=True)) is Int8Linear


@pytest.mark.parametrize("rows", [1, 7, 16, 40])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_gated_linear_is_the_rounded_float64_activation(rows: int, scaled: bool) -> None:
    num_neurons, hidden = 336, 130
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(2 * num_neurons, hidden, generator=generator).bfloat16()
    x = (0.1 * torch.randn(rows, hidden, generator=generator)).bfloat16()
    coefficients = torch.randn(3, num_neurons, generator=generator) if scaled else None
    personas = torch.randint(0, 3, (rows,), generator=generator) if scaled else None
    gate, up = F.linear(x.double(), weight.double()).chunk(2, dim=-1)
    exact = F.silu(gate) * up
    if coefficients is not None and personas is not None:
        exact = exact * coefficients[personas].double()
    for kind in DOT_LINEARS:  # elsewhere the activation is a pass of its own
        linear = kind(weight)
        assert linear.can_gate
        found = linear.gated(x, coefficients, personas)
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
        last = linear.gated(x[-1:], coefficients, None if personas is None else personas[-1:])
        assert torch.equal(last, found[-1:])


def test_a_gate_that_fills_no_vector_or_has_a_bias_is_not_taken_in_one_pass() -> None:
    if DOTS:
        assert not DotLinear(torch.randn(40, 16).bfloat16()).can_gate
        assert not DotLinear(torch.randn(64, 16).bfloat16(), torch.zeros(64).bfloat16()).can_gate
