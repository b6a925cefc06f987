from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from masquerade_kernels import PackedLinear
from masquerade_kernels.linear import padded_rows


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 200])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 32), (77, 45), (1, 5), (130, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_the_rounded_float64_product(rows: int, out_features: int, in_features: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    x = torch.randn(rows, in_features, generator=generator).bfloat16()
    b = torch.randn(out_features, generator=generator).bfloat16() if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    # float32 accumulation and one rounding to bf16, whose spacing is 2^-8 of the value; half of it, doubled for the
    # rounding of a product beside its bias.
    scale = exact.abs() + (x.double().abs() @ weight.double().abs().T) * 2**-16
    assert ((PackedLinear(weight, b)(x).double() - exact).abs() <= scale * 2**-8).all()


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


def test_no_rows_are_no_rows() -> None:
    assert PackedLinear(torch.randn(24, 16).bfloat16())(torch.empty(0, 16).bfloat16()).shape == (0, 24)


def test_another_dtype_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="bfloat16"):
        PackedLinear(torch.randn(8, 8).bfloat16())(torch.randn(1, 8))


def test_bytes_are_those_of_the_weight() -> None:
    assert PackedLinear(torch.randn(8, 16).bfloat16()).num_bytes == 8 * 16 * 2
