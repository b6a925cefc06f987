from __future__ import annotations

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

from masquerade_kernels import CoefficientTable, FFNSegment, GatheredWeights, PackFormat, dense_pack, run_persona_ffn
from masquerade_kernels.packs import member_pack, pack_bytes, union_fraction, union_neurons
from masquerade_kernels.rows import CompiledRows, TorchRows
from masquerade_masks import FFNShape


@pytest.mark.parametrize(
    ("intermediate", "kept", "tokens"), [(96, 64, 5), (97, 33, 3), (33, 1, 1), (40, 40, 17), (129, 64, 70)]
)
@pytest.mark.parametrize(("gain", "bias"), [(False, False), (True, False), (True, True)])
def test_dense_and_compact_are_the_reference(intermediate: int, kept: int, tokens: int, gain: bool, bias: bool) -> None:
    hidden_size = 24
    weights = make_weights(intermediate, hidden_size)
    persona = make_subnetwork(intermediate, hidden_size, kept, seed=1, gain=gain, bias=bias)
    table = CoefficientTable(persona.shape, 4, CPU)
    dense = dense_segment(dense_pack(weights, FP32), table, [persona] * tokens)
    compact = member_segment(member_pack(weights, [persona], FP32), [persona] * tokens)
    x = torch.randn(tokens, hidden_size)
    for layer in range(LAYERS):
        expected = reference(weights, layer, x, persona)
        for segment in (dense, compact):
            for rows in ROWS:
                found = run_persona_ffn(x, layer, [segment], rows)
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_token_has_its_own_persona() -> None:
    weights = make_weights(72, 16)
    personas = [None, *(make_subnetwork(72, 16, 32, seed, gain=seed % 2 == 0, bias=seed == 3) for seed in range(6))]
    table = CoefficientTable(FFNShape(LAYERS, 72, 16), 8, CPU)
    segment = dense_segment(dense_pack(weights, FP32), table, personas)
    x = torch.randn(len(personas), 16)
    found = run_persona_ffn(x, 1, [segment], ROWS[1])
    for row, persona in enumerate(personas):
        expected = reference(weights, 1, x[row : row + 1], persona)
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)


def test_segments_of_several_packs_keep_the_order_of_rows() -> None:
    weights = make_weights(64, 16)
    first, second = (make_subnetwork(64, 16, 32, seed) for seed in (1, 2))
    table = CoefficientTable(first.shape, 4, CPU)
    dense = dense_pack(weights, FP32)
    segments = [
        dense_segment(dense, table, [None, first, second]),
        member_segment(member_pack(weights, [second], FP32), [second] * 4, start=3),
        FFNSegment(7, 9, dense),
    ]
    x = torch.randn(9, 16)
    found = run_persona_ffn(x, 0, segments, ROWS[1])
    for row, persona in enumerate([None, first, second, *[second] * 4, None, None]):
        expected = reference(weights, 0, x[row : row + 1], persona)
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bf16_stays_within_its_rounding(tokens: int) -> None:
    """Six roundings of relative deviation 2^-9 / sqrt(3): 0.3 % together. One neuron of 64 missed would be 12 %."""
    weights = make_weights(96, 64, torch.bfloat16)
    persona = make_subnetwork(96, 64, 64, seed=5, gain=True)
    table = CoefficientTable(persona.shape, 2, CPU)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = reference(weights, 0, x, persona)
    compact = member_segment(member_pack(weights, [persona], BF16), [persona] * tokens)
    for segment in (dense_segment(dense_pack(weights, BF16), table, [persona] * tokens), compact):
        for rows in (TorchRows(), CompiledRows(torch.bfloat16, 2)):
            error = run_persona_ffn(x, 0, [segment], rows).double() - expected
            assert error.square().mean().sqrt() < 0.006 * expected.square().mean().sqrt()


def test_a_cast_shares_the_union_and_each_member_keeps_its_own_function() -> None:
    weights = make_weights(301, 16)
    members = [make_subnetwork(301, 16, 97, seed, gain=seed == 1, bias=seed == 2) for seed in range(4)]
    pack = member_pack(weights, members, FP32)
    union = union_neurons(members)
    assert pack.fraction == union_fraction(members) == sum(map(len, union)) / (LAYERS * 301)
    assert [layer.down.in_features for layer in pack.layers] == [len(layer) for layer in union]
    for layer, neurons in enumerate(union):
        kept = {neuron for member in members for neuron in member.mask.kept_indices()[layer].tolist()}
        assert kept < set(neurons.tolist())
        assert len(neurons) == -(-len(kept) // 13) * 13 < 301
    x = torch.randn(9, 16)
    personas = [members[i % 4] for i in range(9)]
    for layer in range(LAYERS):
        for rows in ROWS:
            found = run_persona_ffn(x, layer, [member_segment(pack, personas)], rows)
            for row, persona in enumerate(personas):
                expected = reference(weights, layer, x[row : row + 1], persona)
                torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_union_is_whole_vectors_where_the_loops_take_those() -> None:
    members = [make_subnetwork(301, 16, 97, seed) for seed in range(4)]
    for layer, neurons in enumerate(union_neurons(members, BF16.union_step(301))):
        kept = {neuron for member in members for neuron in member.mask.kept_indices()[layer].tolist()}
        step = 16 if BF16.union_step(301) == 16 else 13
        assert kept <= set(neurons.tolist())
        assert len(neurons) == min(301, -(-len(kept) // step) * step)


def test_a_union_of_nearly_everything_is_everything() -> None:
    members = [make_subnetwork(97, 16, 60, seed) for seed in range(12)]
    assert [layer.tolist() for layer in union_neurons(members)] == [list(range(97))] * LAYERS


def test_whoever_packs_may_give_up_between_layers() -> None:
    class Enough(Exception):
        pass

    def give_up() -> None:
        raise Enough

    with pytest.raises(Enough):
        member_pack(make_weights(64, 16), [make_subnetwork(64, 16, 32, seed=1)], FP32, give_up)


def test_gains_are_not_folded_into_weights() -> None:
    weights = make_weights(64, 16)
    with_gain = member_pack(weights, [make_subnetwork(64, 16, 32, seed=1, gain=True)], FP32)
    without = member_pack(weights, [make_subnetwork(64, 16, 32, seed=1)], FP32)
    x = torch.randn(2, 16)
    assert torch.equal(with_gain.layers[0].gate_up(x), without.layers[0].gate_up(x))
    assert with_gain.layers[0].coefficients is not None
    assert with_gain.layers[0].coefficients.dtype == torch.float32
    assert without.layers[0].coefficients is None


def test_a_compact_pack_holds_what_was_foretold() -> None:
    persona = make_subnetwork(64, 16, 32, seed=1)
    pack = member_pack(make_weights(64, 16), [persona], FP32)
    assert pack.num_bytes == pack_bytes([persona], FP32) == LAYERS * 3 * 32 * 16 * 4


@pytest.mark.parametrize("gathered", [False, True])
def test_a_pack_with_gains_and_biases_holds_what_was_foretold(gathered: bool) -> None:
    weights = make_weights(64, 16)
    form = PackFormat(
        torch.float32, CPU, gathered=GatheredWeights.of(weights, dtype=torch.float32, device=CPU) if gathered else None
    )
    personas = [make_subnetwork(64, 16, 24, seed, gain=seed == 1, bias=seed == 1) for seed in (1, 2)]
    for members in (personas[:1], personas):
        pack = member_pack(weights, members, form)
        num_neurons = pack.fraction * LAYERS * 64
        weight_bytes = num_neurons * (4 if gathered else 3 * 16 * 4)
        table_bytes = 4 * len(members) * (num_neurons + LAYERS * 16)
        assert pack.num_bytes == pack_bytes(members, form) == weight_bytes + table_bytes


def test_a_whole_table_stays_where_it_is() -> None:
    personas = [make_subnetwork(64, 16, 32, seed, bias=True) for seed in range(20)]
    table = CoefficientTable(personas[0].shape, 12, CPU, whole=True)
    table.rows_of(personas[:1])
    before = table.scales(1).data_ptr(), table.biases(1).data_ptr()
    table.rows_of(personas[:12])
    table.rows_of(personas[8:])
    assert (table.scales(1).data_ptr(), table.biases(1).data_ptr()) == before


def test_the_table_overwrites_the_persona_used_longest_ago() -> None:
    personas = [make_subnetwork(64, 16, 32, seed, bias=seed == 0) for seed in range(20)]
    table = CoefficientTable(personas[0].shape, 3, CPU)
    for persona in personas:
        row = table.rows_of([personas[0], persona])[persona.digest]
        assert np.array_equal(table.scales(1)[row].numpy(), persona.coefficients()[1])
    kept = table.rows_of([personas[0], personas[19], personas[18]])
    assert sorted(kept.values()) == [1, 2, 3]
    assert torch.equal(table.scales(0)[0], torch.ones(64))
    assert table.has_biases(kept)
    assert table.biases(0)[kept[personas[19].digest]].abs().sum() == 0
    assert not table.has_biases([personas[19].digest])


def test_the_table_grows_only_as_far_as_personas_are_active() -> None:
    personas = [make_subnetwork(64, 16, 32, seed) for seed in range(12)]
    table = CoefficientTable(personas[0].shape, 100, CPU)
    small = table.num_bytes
    rows = table.rows_of(personas)
    assert sorted(rows.values()) == list(range(1, 13))
    assert small < table.num_bytes < 3 * small
    for persona in personas:
        assert np.array_equal(table.scales(0)[rows[persona.digest]].numpy(), persona.coefficients()[0])
