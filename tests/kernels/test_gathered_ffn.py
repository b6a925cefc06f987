"""The gathered FFN's kernels against the float64 reference: on a GPU, or on the CPU in triton's interpreter.

Run it by itself as `TRITON_INTERPRET=1 pytest tests/kernels/test_gathered_ffn.py`: triton reads the variable when it is
first imported, so one process is either interpreted or not. test_interpreter.py runs it so, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from masquerade_kernels import FFNSegment, Pack, persona_ffn_reference, run_persona_ffn
from masquerade_kernels.gathered import (
    GatheredLayer,
    GatheredLayerPack,
    GatheredWeights,
    can_gather,
    gathered_ffn,
    gathered_layer_pack,
)
from masquerade_kernels.gathered_blocks import DownBlocks, FFNBlocks, GateUpBlocks
from masquerade_kernels.packs import gathered_dense_pack
from masquerade_kernels.rows import TorchRows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
if not can_gather(DEVICE):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it", allow_module_level=True)

FLOAT32 = 2.0**-24  # half the distance between neighbours, relative
# The interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDING = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: FLOAT32}
UNDERFLOW = {torch.bfloat16: 0.0, torch.float16: 2.0**-24, torch.float32: 0.0}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


@pytest.fixture(autouse=True)
def memory_is_poisoned() -> Iterator[None]:
    """`torch.empty` is full of NaN, so that what a kernel leaves unwritten or reads too early shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """One segment with everything that the kernels and the reference need."""

    hidden: torch.Tensor  # [num_tokens, hidden]
    weights: GatheredLayer
    neurons: torch.Tensor  # int32 [|U|]
    coefficients: torch.Tensor  # float32 [num_rows, |U|]
    persona_of_token: torch.Tensor  # int32 [num_tokens]
    biases: torch.Tensor | None  # float32 [num_rows, hidden]

    def run(self, blocks: FFNBlocks | None = None, coefficients: torch.Tensor | None = None) -> torch.Tensor:
        given = self.coefficients if coefficients is None else coefficients
        return gathered_ffn(
            self.hidden, self.weights, self.neurons, given, self.persona_of_token, self.biases, blocks=blocks
        )

    def over_every_neuron(self) -> torch.Tensor:
        """The coefficients as `[num_rows, intermediate]`; outside U NaN, which nothing may read."""
        rows = torch.full((len(self.coefficients), len(self.weights.down_t)), torch.nan, device=DEVICE)
        rows[:, self.neurons.long()] = self.coefficients
        return rows

    def check(self, found: torch.Tensor) -> None:
        assert found.dtype == self.hidden.dtype
        expected, bound = self._expected_and_bound()
        error = (found.cpu().double() - expected).abs()
        assert (error <= bound).all(), f"{(error / bound).max():.1f} times the bound"

    def _expected_and_bound(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float64 reference, and how far rounding alone can take each output from it (a running error bound).

        Sums of n products in float32 are off by n roundings of the sum of their absolutes at most; SiLU's slope is at
        most 1.1, and its exponential errs by a few roundings and one of its argument. Then one rounding of the
        activation, and one of the output.
        """
        rows, personas = self.neurons.long().cpu(), self.persona_of_token.long().cpu()
        x = self.hidden.cpu().double()
        gate, up, down = (w.cpu()[rows].double() for w in (self.weights.gate, self.weights.up, self.weights.down_t))
        c = self.coefficients.cpu()[personas]
        bias = None if self.biases is None else self.biases.cpu()[personas]
        expected = persona_ffn_reference(x, gate, up, down.T, c, bias)
        rounding = ROUNDING[self.hidden.dtype]

        gates, ups = x @ gate.T, x @ up.T
        off_gates, off_ups = ((x.shape[1] + 1) * FLOAT32 * (x.abs() @ w.abs().T) for w in (gate, up))
        h = F.silu(gates) * ups * c.double()
        off_h = c.double().abs() * (1.1 * off_gates * (ups.abs() + off_ups) + F.silu(gates).abs() * off_ups)
        off_h = off_h + (8 + 2 * gates.abs()) * FLOAT32 * h.abs()
        off_h = off_h + rounding * (h.abs() + off_h) + UNDERFLOW[self.hidden.dtype]
        off = (off_h + (len(rows) + 20) * FLOAT32 * (h.abs() + off_h)) @ down.abs()
        if bias is not None:
            off = off + FLOAT32 * (expected.abs() + bias.double().abs())
        return expected, off + rounding * (expected.abs() + off) + UNDERFLOW[self.hidden.dtype] + 1e-30


def make_case(
    tokens: int,
    kept: int,
    intermediate: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    personas: int = 3,
    bias: bool = False,
    seed: int = 0,
) -> Case:
    """Random weights, of which all rows outside U are NaN: whoever reads one shows it."""
    generator = np.random.default_rng(seed)
    neurons = np.sort(generator.permutation(intermediate)[:kept]).astype(np.int32)

    def weight() -> torch.Tensor:
        rows = np.full((intermediate, hidden), np.nan)
        rows[neurons] = generator.normal(0, hidden**-0.5, (kept, hidden))
        return torch.from_numpy(rows).to(DEVICE, dtype)

    layer = GatheredLayer(torch.cat([weight(), weight()]), weight())
    coefficients = generator.normal(1, 0.3, (personas + 1, kept)) * (generator.random((personas + 1, kept)) < 0.6)
    coefficients[0] = 1
    biases = generator.normal(0, 1, (personas + 1, hidden)).astype(np.float32) if bias else None
    pack = gathered_layer_pack(layer, neurons, coefficients.astype(np.float32), biases)
    assert pack.coefficients is not None
    persona_of_token = torch.from_numpy(generator.integers(0, personas + 1, tokens).astype(np.int32)).to(DEVICE)
    x = torch.from_numpy(generator.normal(0, 2, (tokens, hidden))).to(DEVICE, dtype)
    return Case(x, layer, pack.neurons, pack.coefficients, persona_of_token, pack.biases)


def small_blocks(num_splits: int = 1) -> FFNBlocks:
    """Many programs over few neurons, as a GPU has over many."""
    return FFNBlocks(GateUpBlocks(16, 16, 16, 4, 2), DownBlocks(16, 16, 16, num_splits, 4, 2))


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "kept", "intermediate", "hidden"),
    [
        pytest.param(1, 1, 1, 16, id="one of everything"),
        pytest.param(1, 64, 96, 128, id="one token"),
        pytest.param(5, 1, 40, 48, id="one kept neuron"),
        pytest.param(16, 96, 96, 64, id="all neurons"),
        pytest.param(7, 33, 97, 40, id="odd sizes"),
        pytest.param(3, 70, 90, 131, id="hidden not a multiple of the block"),
        pytest.param(33, 40, 64, 32, id="over one block of tokens"),
        pytest.param(130, 24, 40, 24, id="over the largest block of tokens"),
        pytest.param(2, 520, 700, 136, id="split over neurons"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_table_s_blocks_are_the_reference(
    tokens: int, kept: int, intermediate: int, hidden: int, dtype: torch.dtype, bias: bool
) -> None:
    case = make_case(tokens, kept, intermediate, hidden, dtype, bias=bias)
    case.check(case.run())


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_over_many_blocks_are_the_reference(seed: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(1000 + seed)
    intermediate = int(generator.integers(1, 120))
    kept = int(generator.integers(1, intermediate + 1))
    tokens, hidden, personas = (int(generator.integers(low, high)) for low, high in ((1, 40), (1, 70), (1, 9)))
    case = make_case(
        tokens, kept, intermediate, hidden, dtype, personas=personas, bias=bool(generator.random() < 0.5), seed=seed
    )
    blocks = small_blocks(num_splits=int(2 ** generator.integers(0, 4)))
    case.check(case.run(blocks))


@pytest.mark.parametrize("num_splits", [1, 2, 4, 8])
def test_splits_with_a_short_or_missing_last_share(num_splits: int) -> None:
    """72 neurons are five blocks of 16: with 4 splits the third gets one, and the fourth would get none."""
    case = make_case(3, 72, 80, 32, torch.float32, bias=True)
    case.check(case.run(small_blocks(num_splits)))


@DTYPES
def test_coefficients_may_have_a_column_for_every_neuron(dtype: torch.dtype) -> None:
    case = make_case(6, 50, 90, 40, dtype, bias=True)
    assert torch.equal(case.run(coefficients=case.over_every_neuron()), case.run())


@DTYPES
def test_without_coefficients_every_neuron_counts_once(dtype: torch.dtype) -> None:
    case = make_case(6, 50, 90, 40, dtype, personas=0)
    plain = gathered_ffn(case.hidden, case.weights, case.neurons, None, None)
    assert torch.equal(plain, case.run())
    case.check(plain)


def test_personas_may_be_int64() -> None:
    case = make_case(6, 20, 30, 16, torch.float32)
    found = case.run()
    case.persona_of_token = case.persona_of_token.long()
    assert torch.equal(case.run(), found)


def test_a_run_is_repeated_bit_by_bit() -> None:
    case = make_case(16, 500, 600, 64, torch.float32, bias=True)
    first = case.run(small_blocks(num_splits=8))
    assert all(torch.equal(case.run(small_blocks(num_splits=8)), first) for _ in range(3))


def test_a_token_is_computed_alike_whatever_runs_beside_it() -> None:
    case = make_case(16, 200, 300, 64, torch.bfloat16)
    together = case.run(small_blocks(num_splits=4))
    for token in (0, 7, 15):
        alone = gathered_ffn(
            case.hidden[token : token + 1],
            case.weights,
            case.neurons,
            case.coefficients,
            case.persona_of_token[token : token + 1],
            blocks=small_blocks(num_splits=4),
        )
        assert torch.equal(alone[0], together[token])


def test_saturated_gates_are_zero_or_themselves() -> None:
    """exp overflows for gates below -88, and its inverse is the 0 that SiLU then has."""
    case = make_case(4, 32, 40, 16, torch.float32)
    case.hidden *= 200
    with np.errstate(over="ignore"):
        found = case.run()
    assert torch.isfinite(found).all()
    case.check(found)


def test_segments_run_each_on_its_pack() -> None:
    """Two layers, of which a gathered pack reads 30 and 11 neurons, and the dense one between its rows all 40."""
    cases = [make_case(9, kept, 40, 24, torch.float32, seed=kept, bias=True) for kept in (30, 11)]
    for case in cases:
        case.weights = GatheredLayer(torch.randn(80, 24, device=DEVICE) / 5, torch.randn(40, 24, device=DEVICE) / 5)
    layers = [GatheredLayerPack(case.weights, case.neurons, case.coefficients, case.biases) for case in cases]
    narrow = Pack(tuple(layers), ("base", "a", "b", "c"), 41 / 80)
    dense = gathered_dense_pack(GatheredWeights(tuple(case.weights for case in cases)))
    x = torch.randn(9, 24, device=DEVICE)
    personas = torch.tensor([1, 2, 3, 1, 1], device=DEVICE)
    segments = [
        FFNSegment(0, 3, narrow, personas[:3]),
        FFNSegment(3, 7, dense),
        FFNSegment(7, 9, narrow, personas[3:]),
    ]
    for layer, case in enumerate(cases):
        found = run_persona_ffn(x, layer, segments, TorchRows())
        for rows, of_token in ((slice(0, 3), personas[:3]), (slice(7, 9), personas[3:])):
            case.hidden, case.persona_of_token = x[rows], of_token
            case.check(found[rows])
        weights = case.weights
        base = persona_ffn_reference(x[3:7].cpu(), weights.gate.cpu(), weights.up.cpu(), weights.down_t.cpu().T)
        torch.testing.assert_close(found[3:7].cpu().double(), base, rtol=1e-5, atol=1e-5)
