"""Every compiled loop against plain float64 torch, on one thread and on several, below and above the parallel size."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from masquerade_kernels.cpu_attention import attention_loops
from masquerade_kernels.linear import Int8Linear
from masquerade_kernels.rows import CompiledRows, Norm, TorchRows

THREADS = [1, 2]
ROWS = [1, 3, 47, 48, 130]
DTYPES = [torch.float32, torch.bfloat16]
# Relative to the largest value. bf16 keeps 8 bits: half a unit in the last place is 2^-9 of a value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.isfinite().all()
    scale = expected.abs().max().clamp(min=1e-6)
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * scale


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_rms_norms(num_rows: int, dtype: torch.dtype, threads: int) -> None:
    rows = CompiledRows(dtype, threads)
    x, delta = normal(num_rows, 61, dtype=dtype), normal(num_rows, 61, dtype=dtype, seed=1)
    norm = Norm(normal(61, dtype=dtype, seed=2), 1e-5)
    assert_close(rows.norm(x, norm), F.rms_norm(x.double(), (61,), norm.weight.double(), 1e-5))
    added, total = x + delta, x.clone()
    found = rows.add_norm(total, delta, norm)
    assert torch.equal(total, added)
    assert_close(found, F.rms_norm(added.double(), (61,), norm.weight.double(), 1e-5))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_takes_each_rows_own_coefficients(num_rows: int, dtype: torch.dtype, threads: int) -> None:
    gate_up = 4 * normal(num_rows, 2 * 37, dtype=dtype)
    coefficients, personas = normal(5, 37, seed=1), torch.arange(num_rows) % 5
    gate, up = gate_up.double().chunk(2, dim=-1)
    plain = F.silu(gate) * up
    rows = CompiledRows(dtype, threads)
    assert_close(rows.swiglu(gate_up, None, None), plain)
    assert_close(rows.swiglu(gate_up, coefficients, personas), plain * coefficients[personas].double())


def test_swiglu_reaches_the_far_ends_of_its_exponential() -> None:
    gates = torch.tensor([-1e4, -90.0, -87.5, -20.0, -1e-3, 0.0, 1e-3, 20.0, 87.5, 90.0, 1e4])
    found = CompiledRows(torch.float32, 1).swiglu(torch.cat([gates, torch.ones(11)])[None], None, None)[0]
    torch.testing.assert_close(found, F.silu(gates), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_torch_rows_do_the_same(dtype: torch.dtype) -> None:
    norm = Norm(normal(64, dtype=dtype), 1e-6)
    one, other = TorchRows(), CompiledRows(dtype, 2)
    x, delta = normal(9, 64, dtype=dtype), normal(9, 64, dtype=dtype, seed=1)
    assert_close(one.norm(x, norm), other.norm(x, norm).double())
    assert_close(one.add_norm(x.clone(), delta, norm), other.add_norm(x.clone(), delta, norm).double())
    gates, coefficients, personas = normal(9, 64, dtype=dtype), normal(3, 32), torch.arange(9) % 3
    expected = other.swiglu(gates, coefficients, personas).double()
    # Plain torch rounds after each of its three products.
    assert (one.swiglu(gates, coefficients, personas) - expected).abs().max() <= 3 * TOLERANCE[
        dtype
    ] * expected.abs().max()


@dataclass
class Attended:
    """One call of both attention loops on random rows, and what plain torch makes of the same."""

    queries: torch.Tensor  # rotated, [num_rows, heads, head_dim]
    keys: torch.Tensor  # written, [num_rows, kv_heads, head_dim]
    values: torch.Tensor
    out: torch.Tensor
    expected_queries: torch.Tensor
    expected_keys: torch.Tensor
    expected_values: torch.Tensor
    expected_out: torch.Tensor


def attended(
    num_rows: int,
    dtype: torch.dtype,
    threads: int,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    norm: bool,
) -> Attended:
    heads, max_len, num_slots = kv_heads * group, 70, num_rows + 3
    generator = torch.Generator().manual_seed(num_rows)
    qkv = normal(num_rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
    keys = normal(num_slots, kv_heads, max_len, head_dim, dtype=dtype, seed=1)
    values = normal(num_slots, kv_heads, max_len, head_dim, dtype=dtype, seed=2)
    positions = torch.randint(0, max_len, (num_rows,), generator=generator)
    slots = torch.randperm(num_slots, generator=generator)[:num_rows]
    angles = normal(max_len, head_dim // 2, seed=3)
    cos, sin = angles.cos(), angles.sin()
    weights = normal(2, head_dim, dtype=dtype, seed=4)
    raw = qkv.double()
    if norm:
        normed = F.rms_norm(raw[:, : heads + kv_heads], (head_dim,), eps=1e-6)
        normed[:, :heads] *= weights[0].double()
        normed[:, heads:] *= weights[1].double()
        raw = torch.cat([normed.to(dtype).double(), raw[:, heads + kv_heads :]], dim=1)
    c, s = cos[positions][:, None].double(), sin[positions][:, None].double()
    low, high = raw[:, : heads + kv_heads].chunk(2, dim=-1)
    rotated = torch.cat([low * c - high * s, high * c + low * s], dim=-1)
    loops = attention_loops(8 * dtype.itemsize, head_dim, group, threads)
    at = [weights[0].data_ptr(), weights[1].data_ptr()] if norm else [0, 0]
    loops.rotate_store(
        num_rows, heads, kv_heads, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), max_len, positions.data_ptr(),
        slots.data_ptr(), keys.data_ptr(), values.data_ptr(), num_slots, max_len, *at, 1e-6,
    )  # fmt: skip
    lengths, out = positions + 1, torch.zeros(num_rows, heads, head_dim, dtype=dtype)
    tasks = torch.randperm(num_rows * kv_heads, generator=generator)
    bounds = torch.linspace(0, len(tasks), threads + 1).long()
    num_keys = 10**6 if threads > 1 else 0  # above the size for several threads
    loops.attend(
        num_keys, num_rows, heads, kv_heads, qkv.data_ptr(), slots.data_ptr(), lengths.data_ptr(), int(lengths.max()),
        tasks.data_ptr(), bounds.data_ptr(), threads, keys.data_ptr(), values.data_ptr(), num_slots, max_len, window,
        head_dim**-0.5, out.data_ptr(),
    )  # fmt: skip
    expected = torch.zeros(num_rows, heads, head_dim, dtype=torch.float64)
    for row in range(num_rows):
        seen = slice(max(0, int(lengths[row]) - window) if window else 0, int(lengths[row]))
        query = qkv[row, :heads].double().view(kv_heads, group, head_dim)
        own_keys, own_values = keys[slots[row], :, seen].double(), values[slots[row], :, seen].double()
        weight = (query @ own_keys.transpose(1, 2) * head_dim**-0.5).softmax(dim=-1)
        expected[row] = (weight @ own_values).view(heads, head_dim)
    return Attended(
        qkv[:, :heads], keys[slots, :, positions], values[slots, :, positions], out,
        rotated[:, :heads], rotated[:, heads:], raw[:, heads + kv_heads :], expected,
    )  # fmt: skip


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("num_rows", [1, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "window", "norm"),
    [(3, 3, 64, 0, False), (2, 1, 10, 7, True), (1, 5, 128, 0, False), (2, 2, 32, 37, True)],
)
def test_attention_is_plain_attention(
    num_rows: int, dtype: torch.dtype, threads: int, kv_heads: int, group: int, head_dim: int, window: int, norm: bool
) -> None:
    made = attended(
        num_rows, dtype, threads, kv_heads=kv_heads, group=group, head_dim=head_dim, window=window, norm=norm
    )
    assert_close(made.queries, made.expected_queries)
    assert_close(made.keys, made.expected_keys)
    assert torch.equal(made.values.double(), made.expected_values)
    assert_close(made.out, made.expected_out)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_linear_stays_within_its_rounding(
    num_rows: int, dtype: torch.dtype, threads: int, request: pytest.FixtureRequest
) -> None:
    """A weight's rounding to 127 steps of its row's largest, 2.5 deviations or so: 2.5 / 127 / sqrt(12) = 0.6 %.

    Outliers of 30 deviations in the activations must not make it worse.
    """
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    weight, bias = normal(97, 61, dtype=dtype, seed=1), normal(97, dtype=dtype, seed=2)
    x = normal(num_rows, 61, dtype=dtype)
    x[:, 7] *= 30
    with torch.inference_mode():
        found = Int8Linear(weight, bias)(x).double()
    exact = x.double() @ weight.double().T + bias.double()
    assert found.isfinite().all()
    assert (found - exact).square().mean().sqrt() < 0.009 * exact.square().mean().sqrt()


def test_a_row_of_an_int8_linear_does_not_know_its_neighbours() -> None:
    linear = Int8Linear(normal(64, 32, seed=1))
    x = normal(20, 32)
    together = linear(torch.cat([x, 1000 * x]))[:20]
    assert torch.equal(together, linear(x))
    assert torch.equal(linear(torch.zeros(2, 32)), torch.zeros(2, 64))
