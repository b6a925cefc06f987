"""Attached weights in every pack: the float64 reference is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_ffn import (
    BF16,
    CPU,
    FP32,
    LAYERS,
    ROWS,
    dense_segment,
    make_subnetwork,
    make_weights,
    member_segment,
    reference,
)

from masquerade_kernels import (
    CoefficientTable,
    dense_pack,
    persona_ffn_reference,
    run_persona_ffn,
)
from masquerade_kernels.lora import lora_bytes
from masquerade_kernels.packs import member_pack, pack_bytes
from masquerade_kernels.rows import CompiledRows, TorchRows
from masquerade_masks import Attached, FFNShape, SubNetwork
from masquerade_masks.attached import full_name, lora_name

Make = Callable[..., Attached]


@pytest.fixture
def with_lora(make_attached: Make) -> Callable[..., SubNetwork]:
    """`with_lora(subnetwork, seed=, rank=, alpha=, dtype=)`."""

    def attach(subnetwork: SubNetwork, **arguments: object) -> SubNetwork:
        return replace(subnetwork, weights=make_attached("lora", subnetwork.shape, subnetwork.mask.kept, **arguments))

    return attach


@pytest.mark.parametrize(
    ("intermediate", "kept", "tokens", "rank"), [(96, 64, 5, 8), (97, 33, 3, 1), (33, 1, 1, 40), (40, 40, 70, 3)]
)
@pytest.mark.parametrize(("gain", "bias"), [(False, False), (True, True)])
def test_low_rank_updates_are_the_reference(
    intermediate: int, kept: int, tokens: int, rank: int, gain: bool, bias: bool, with_lora: Callable[..., SubNetwork]
) -> None:
    weights = make_weights(intermediate, 24)
    plain = make_subnetwork(intermediate, 24, kept, seed=1, gain=gain, bias=bias)
    persona = with_lora(plain, rank=rank)
    table = CoefficientTable(persona.shape, 4, CPU)
    dense = dense_segment(dense_pack(weights, FP32), table, [persona] * tokens)
    compact = member_segment(member_pack(weights, [persona], FP32), [persona] * tokens)
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        expected = reference(weights, layer, x, persona)
        assert (expected - reference(weights, layer, x, plain)).abs().max() > 1e-3
        for segment in (dense, compact):
            for rows in ROWS:
                found = run_persona_ffn(x, layer, [segment], rows)
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_every_token_has_its_own_updates(with_lora: Callable[..., SubNetwork]) -> None:
    """Rows of one persona together and apart, among others without updates, of other ranks, and of the base."""
    weights = make_weights(72, 16)
    first, second = (
        with_lora(make_subnetwork(72, 16, 32, seed, gain=True), seed=seed, rank=2 + seed) for seed in (1, 2)
    )
    plain = make_subnetwork(72, 16, 32, 3)
    personas = [first, None, first, second, second, plain, None, first]
    table = CoefficientTable(FFNShape(LAYERS, 72, 16), 8, CPU)
    segment = dense_segment(dense_pack(weights, FP32), table, personas)
    assert {type(lora.rows) for lora in segment.loras} == {slice, torch.Tensor}
    x = torch.randn(len(personas), 16)
    for rows in ROWS:
        found = run_persona_ffn(x, 1, [segment], rows)
        for row, persona in enumerate(personas):
            expected = reference(weights, 1, x[row : row + 1], persona)
            torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=2e-5)


def test_members_of_a_cast_keep_their_own_updates(with_lora: Callable[..., SubNetwork]) -> None:
    weights = make_weights(97, 16)
    members = [make_subnetwork(97, 16, 33, seed, gain=seed == 1, bias=seed == 2) for seed in range(4)]
    members = [with_lora(one, seed=i) if i % 2 else one for i, one in enumerate(members)]
    pack = member_pack(weights, members, FP32)
    assert set(pack.loras) == {members[1].digest, members[3].digest}
    personas = [members[i % 4] for i in range(9)]
    x = torch.randn(9, 16)
    for layer in range(LAYERS):
        found = run_persona_ffn(x, layer, [member_segment(pack, personas)], ROWS[1])
        for row, persona in enumerate(personas):
            expected = reference(weights, layer, x[row : row + 1], persona)
            torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=2e-5)


def test_dropped_neurons_never_contribute(with_lora: Callable[..., SubNetwork]) -> None:
    """Whatever the factors hold there: the same bits with and without."""
    weights = make_weights(96, 16)
    persona = with_lora(make_subnetwork(96, 16, 32, seed=1))
    assert persona.weights is not None
    wild = {name: tensor.copy() for name, tensor in persona.weights.tensors.items()}
    for layer in range(LAYERS):
        dropped = ~persona.mask.to_dense()[layer]
        for part in ("gate_proj", "up_proj"):
            wild[lora_name(layer, part, "B")][dropped] = 60_000
        wild[lora_name(layer, "down_proj", "A")][:, dropped] = -60_000
    other = replace(persona, attached=(), weights=replace(persona.weights, tensors=wild))
    neighbour = make_subnetwork(96, 16, 32, seed=2)
    x = torch.randn(6, 16)
    for rows in ROWS:
        for layer in range(LAYERS):
            outputs = []
            for one in (persona, other):
                table = CoefficientTable(one.shape, 4, CPU)
                segments = [
                    dense_segment(dense_pack(weights, FP32), table, [one] * 2),
                    member_segment(member_pack(weights, [one], FP32), [one] * 2, start=2),
                    member_segment(member_pack(weights, [one, neighbour], FP32), [one] * 2, start=4),
                ]
                outputs.append(run_persona_ffn(x, layer, segments, rows))
            assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_updates_in_bf16_stay_within_its_rounding(dtype: object, with_lora: Callable[..., SubNetwork]) -> None:
    """Ten roundings of relative deviation 2^-9 / sqrt(3): 0.36 % together."""
    weights = make_weights(96, 64, torch.bfloat16)
    persona = with_lora(make_subnetwork(96, 64, 64, seed=5, gain=True), dtype=dtype, rank=8)
    table = CoefficientTable(persona.shape, 2, CPU, torch.bfloat16)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = reference(weights, 0, x, persona)
    compact = member_segment(member_pack(weights, [persona], BF16), [persona] * 20)
    for segment in (dense_segment(dense_pack(weights, BF16), table, [persona] * 20), compact):
        for rows in (TorchRows(), CompiledRows(torch.bfloat16, 2)):
            error = run_persona_ffn(x, 0, [segment], rows).double() - expected
            assert error.square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()


def test_a_pack_with_updates_holds_what_was_foretold(with_lora: Callable[..., SubNetwork]) -> None:
    weights = make_weights(64, 16)
    persona = with_lora(make_subnetwork(64, 16, 32, seed=1), rank=3)
    pack = member_pack(weights, [persona], FP32)
    updates = LAYERS * 3 * (16 + 32) * 3 * 4  # layers, parts, sides, rank, float32
    assert lora_bytes(persona, LAYERS * 32, 4) == updates
    assert pack.num_bytes == pack_bytes([persona], FP32) == LAYERS * 3 * 32 * 16 * 4 + updates
    members = [persona, make_subnetwork(64, 16, 32, seed=2)]
    assert member_pack(weights, members, FP32).num_bytes == pack_bytes(members, FP32)


def test_the_table_gives_up_updates_with_their_row(with_lora: Callable[..., SubNetwork]) -> None:
    personas = [with_lora(make_subnetwork(64, 16, 32, seed), seed=seed) for seed in range(5)]
    table = CoefficientTable(personas[0].shape, 2, CPU)
    for persona in personas:
        table.rows_of([persona])
    assert set(table.loras) == {personas[3].digest, personas[4].digest}
    assert table.num_bytes == table.scales(0).nbytes * LAYERS + 2 * lora_bytes(personas[0], LAYERS * 64, 4)


# Weights of one's own


@pytest.mark.parametrize(("intermediate", "kept", "tokens"), [(96, 64, 5), (97, 33, 3), (33, 1, 1)])
@pytest.mark.parametrize(("gain", "bias"), [(False, False), (True, True)])
def test_own_weights_are_the_reference(
    intermediate: int, kept: int, tokens: int, gain: bool, bias: bool, make_attached: Make
) -> None:
    subnetwork = make_subnetwork(intermediate, 24, kept, seed=1, gain=gain, bias=bias)
    own = make_attached("full", subnetwork.shape, kept, dtype=np.float32)
    persona = replace(subnetwork, weights=own)
    pack = member_pack(make_weights(intermediate, 24), [persona], FP32)
    tables = LAYERS * (kept + 24) * 4 if gain else 0  # gains and biases
    assert pack.num_bytes == pack_bytes([persona], FP32) == LAYERS * 3 * kept * 24 * 4 + tables
    x = torch.randn(tokens, 24)
    for layer in range(LAYERS):
        gate, up, down = (
            torch.tensor(own.tensors[full_name(layer, part)]) for part in ("gate_proj", "up_proj", "down_proj")
        )
        scales = persona.coefficients()[layer][persona.mask.layer(layer)]
        biases = persona.biases()
        bias_row = None if biases is None else torch.from_numpy(biases)[layer]
        expected = persona_ffn_reference(x, gate, up, down, torch.from_numpy(scales), bias_row)
        for rows in ROWS:
            found = run_persona_ffn(x, layer, [member_segment(pack, [persona] * tokens)], rows)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_own_weights_have_no_place_beside_others(make_attached: Make, with_lora: Callable[..., SubNetwork]) -> None:
    subnetwork = make_subnetwork(64, 16, 32, seed=1)
    own = replace(subnetwork, weights=make_attached("full", subnetwork.shape, 32))
    with pytest.raises(AssertionError, match="shared with nobody"):
        member_pack(make_weights(64, 16), [own, subnetwork], FP32)
    with pytest.raises(AssertionError, match="a pack of their own"):
        CoefficientTable(subnetwork.shape, 2, CPU).rows_of([own])
