from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from masquerade_masks import (
    EmptyLayer,
    FFNShape,
    Mask,
    MaskFormatError,
    MaskIndexError,
    MaskShapeError,
    SettingError,
    chance_jaccard,
    round_kept,
    union,
)


@st.composite
def index_rows(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Kept indices in any order, and the intermediate size, mostly no multiple of 8."""
    intermediate = draw(st.integers(1, 70))
    kept = draw(st.integers(1, intermediate))
    rows = draw(st.lists(st.permutations(range(intermediate)), min_size=1, max_size=4))
    return [row[:kept] for row in rows], intermediate


@given(index_rows())
def test_kept_indices_survive_packing(case: tuple[list[list[int]], int]) -> None:
    rows, intermediate = case
    mask = Mask.from_kept_indices(rows, intermediate)
    assert mask.kept_indices().tolist() == [sorted(row) for row in rows]
    assert mask.kept_indices().dtype == np.int32
    assert (mask.num_layers, mask.kept) == (len(rows), len(rows[0]))
    assert mask.sparsity == pytest.approx(1 - len(rows[0]) / intermediate)
    assert mask.bits.shape == (len(rows), (intermediate + 7) // 8)
    assert Mask.from_dense(mask.to_dense()) == mask


@given(index_rows())
def test_bit_i_mod_8_of_byte_i_div_8_is_neuron_i(case: tuple[list[list[int]], int]) -> None:
    rows, intermediate = case
    mask = Mask.from_kept_indices(rows, intermediate)
    for layer, row in enumerate(rows):
        for neuron in range(8 * mask.bits.shape[1]):
            is_set = bool(mask.bits[layer, neuron // 8] >> (neuron % 8) & 1)
            assert is_set == (neuron in row)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_a_dense_array_is_a_mask_exactly_when_its_layers_are_equal_and_not_empty(dense: np.ndarray) -> None:
    counts = dense.sum(axis=1)
    if (counts == 0).any():
        with pytest.raises(EmptyLayer) as empty:
            Mask.from_dense(dense)
        assert counts[empty.value.layer] == 0
    elif (counts != counts[0]).any():
        with pytest.raises(MaskShapeError, match="same number"):
            Mask.from_dense(dense)
    else:
        assert np.array_equal(Mask.from_dense(dense).to_dense(), dense)


def test_out_of_range_and_duplicate_indices_are_refused() -> None:
    with pytest.raises(MaskIndexError, match="layer 1 keeps neuron 9, not one of 0 to 8"):
        Mask.from_kept_indices([[0, 1], [2, 9]], 9)
    with pytest.raises(MaskIndexError, match="layer 0 keeps neuron -1"):
        Mask.from_kept_indices([[0, -1], [2, 3]], 9)
    with pytest.raises(MaskIndexError, match="layer 1 keeps neuron 3 twice") as twice:
        Mask.from_kept_indices([[0, 1], [3, 3]], 9)
    assert twice.value.layer == 1
    with pytest.raises(MaskIndexError, match="layer 0"):
        Mask.from_kept_indices(np.array([[2**64 - 1, 0]], dtype=np.uint64), 9)


def test_indices_that_are_no_integer_matrix_are_refused() -> None:
    with pytest.raises(EmptyLayer):
        Mask.from_kept_indices([[], []], 9)
    with pytest.raises(MaskShapeError, match="layers"):
        Mask.from_kept_indices([1, 2], 9)
    with pytest.raises(MaskShapeError, match="as many in every layer"):
        Mask.from_kept_indices([[1, 2], [3]], 9)
    with pytest.raises(MaskFormatError, match="float64"):
        Mask.from_kept_indices([[1.0, 2.0]], 9)


def test_a_set_padding_bit_is_refused() -> None:
    bits = Mask.from_kept_indices([[0], [8]], 9).bits.copy()
    bits[1, 1] = 0b100  # neuron 10 of 9
    with pytest.raises(MaskIndexError, match="layer 1 keeps neuron 10, and the last is 8"):
        Mask(bits, 9)


@pytest.mark.parametrize(
    ("bits", "intermediate"),
    [
        (np.ones((2, 2), np.int64), 9),
        (np.ones((2, 3), np.uint8), 9),
        (np.ones(2, np.uint8), 9),
        (np.ones((0, 2), np.uint8), 9),
        (np.ones((2, 0), np.uint8), 0),
    ],
)
def test_bits_of_another_shape_or_dtype_are_refused(bits: np.ndarray, intermediate: int) -> None:
    with pytest.raises(MaskShapeError):
        Mask(bits, intermediate)


def test_a_mask_cannot_be_changed_by_the_array_it_came_from() -> None:
    dense = np.eye(3, dtype=np.bool_)
    bits = np.packbits(dense, axis=1, bitorder="little")
    mask = Mask(bits, 3)
    bits[:] = 7
    assert np.array_equal(mask.to_dense(), dense)
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0, 0] = 1


def test_equal_masks_hash_alike() -> None:
    mask, same = (Mask.from_kept_indices([[0, 3]], 5) for _ in range(2))
    assert mask == same
    assert hash(mask) == hash(same)
    assert mask != Mask.from_kept_indices([[0, 3]], 6)
    assert mask != "a mask"


def test_jaccard_is_the_mean_over_layers() -> None:
    one = Mask.from_kept_indices([[0, 1], [0, 1]], 4)
    other = Mask.from_kept_indices([[0, 1], [1, 2]], 4)
    assert one.jaccard(other) == pytest.approx((1 + 1 / 3) / 2)
    assert one.jaccard(one) == 1
    with pytest.raises(MaskShapeError, match="2 x 4 neurons against 2 x 5"):
        one.jaccard(Mask.from_kept_indices([[0, 1], [0, 1]], 5))


def test_union_is_what_any_mask_keeps() -> None:
    masks = [Mask.from_kept_indices([[0, 1], [0, 1]], 9), Mask.from_kept_indices([[0, 1], [1, 8]], 9)]
    assert [np.flatnonzero(layer).tolist() for layer in union(masks)] == [[0, 1], [0, 1, 8]]
    assert masks[0] == Mask.from_kept_indices([[0, 1], [0, 1]], 9)
    with pytest.raises(MaskShapeError):
        union([masks[0], Mask.from_kept_indices([[0]], 9)])
    with pytest.raises(ValueError):
        union([])


def test_chance_jaccard_is_what_random_masks_have() -> None:
    assert chance_jaccard(75, 100) == pytest.approx(0.75 / 1.25)  # the paper's 0.60 at 25 %
    rng = np.random.default_rng(0)
    one, other = (
        Mask.from_kept_indices(np.stack([rng.permutation(512)[:256] for _ in range(64)]), 512) for _ in range(2)
    )
    assert one.jaccard(other) == pytest.approx(chance_jaccard(256, 512), abs=0.01)


@pytest.mark.parametrize(
    ("intermediate", "sparsity", "kept"),
    [
        (1536, 0.25, 1152),
        (1536, 0.5, 768),
        (8192, 0.3, 5728),  # 5734.4 is 179.2 x 32
        (14336, 0.9, 1440),  # 1433.6 is 44.8 x 32
        (1536, 0.999, 32),  # at least 32
        (1536, 0.0, 1536),
        (100, 0.0, 100),
        (96, 0.25, 64),
        (96, 0.5, 32),  # 48 lies midway
        (48, 0.25, 36),
        (20, 0.99, 1),
        (1, 0.5, 1),
    ],
)
def test_kept_counts_are_rounded_to_multiples_of_32(intermediate: int, sparsity: float, kept: int) -> None:
    assert round_kept(intermediate, sparsity) == kept


@given(st.integers(1, 20_000), st.floats(0, 0.999))
def test_kept_counts_are_possible_and_near(intermediate: int, sparsity: float) -> None:
    kept = round_kept(intermediate, sparsity)
    assert 1 <= kept <= intermediate
    assert abs(kept - intermediate * (1 - sparsity)) <= 32
    assert kept % 32 == 0 or intermediate < 64 or kept == intermediate


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), float("inf"), 2.0])
def test_a_sparsity_that_is_none_is_refused(sparsity: float) -> None:
    with pytest.raises(SettingError) as refused:
        round_kept(1536, sparsity)
    assert refused.value.field == "sparsity"


def test_an_ffn_without_layers_is_refused() -> None:
    with pytest.raises(MaskShapeError, match="0 layers"):
        FFNShape(0, 8, 8)
