"""Masks: which FFN neurons of every layer a persona keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from masquerade_masks.errors import EmptyLayer, MaskFormatError, MaskIndexError, MaskShapeError, SettingError

BoolArray = npt.NDArray[np.bool_]
Bits = npt.NDArray[np.uint8]

_KEPT_MULTIPLE = 32  # rows of a packed tile on every device that was measured
_SMALL_LAYER = 64  # below it, kept counts are not rounded: such layers exist in tests only


@dataclass(frozen=True, slots=True)
class FFNShape:
    """The sizes of a base's FFN that a mask depends on."""

    num_layers: int
    intermediate_size: int  # neurons a layer
    hidden_size: int

    def __post_init__(self) -> None:
        if min(self.num_layers, self.intermediate_size, self.hidden_size) < 1:
            raise MaskShapeError(f"an FFN has at least one layer, neuron and hidden unit; this is {self}")

    def __str__(self) -> str:
        return f"{self.num_layers} layers x {self.intermediate_size} neurons, hidden size {self.hidden_size}"


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The kept neurons of every layer, the same number in each, bit-packed.

    `bits` is uint8 `[num_layers, ceil(intermediate_size / 8)]`, read-only; bit `i % 8` (least significant
    first) of byte `i // 8` is set where neuron `i` is kept; padding bits are zero.

    Raises `MaskShapeError` (shape, dtype, layers of unequal count), `MaskIndexError` (a padding bit is set)
    and `EmptyLayer`.
    """

    bits: Bits
    intermediate_size: int

    def __post_init__(self) -> None:
        check_bits(self.bits, self.intermediate_size)
        check_uniform(self.bits)
        object.__setattr__(self, "bits", _read_only(self.bits))

    @classmethod
    def from_dense(cls, dense: BoolArray) -> Mask:
        """From bool `[num_layers, intermediate_size]`, true where a neuron is kept."""
        dense = np.asarray(dense)
        if dense.ndim != 2 or dense.dtype != np.bool_:
            raise MaskShapeError(f"a dense mask is bool [layers, neurons]; this is {dense.dtype} {dense.shape}")
        return cls(np.packbits(dense, axis=1, bitorder="little"), dense.shape[1])

    @classmethod
    def from_kept_indices(cls, indices: npt.ArrayLike, intermediate_size: int) -> Mask:
        """From integers `[num_layers, kept]` in any order.

        Raises `MaskShapeError` or `MaskFormatError` where they are not such an array, `MaskIndexError` for an
        index out of range or twice in its layer, `EmptyLayer` where kept is 0.
        """
        kept = _integer_matrix(indices)
        if kept.shape[1] == 0:
            raise EmptyLayer(0)
        _check_indices(kept, intermediate_size)
        dense = np.zeros((kept.shape[0], intermediate_size), dtype=np.bool_)
        np.put_along_axis(dense, kept.astype(np.int64), True, axis=1)
        return cls.from_dense(dense)

    @property
    def num_layers(self) -> int:
        return int(self.bits.shape[0])

    @property
    def kept(self) -> int:
        """Neurons kept in each layer."""
        return int(np.unpackbits(self.bits[0]).sum())

    @property
    def sparsity(self) -> float:
        """The share of neurons dropped, 0 to 1."""
        return 1.0 - self.kept / self.intermediate_size

    def to_dense(self) -> BoolArray:
        """Bool `[num_layers, intermediate_size]`."""
        bits = np.unpackbits(self.bits, axis=1, count=self.intermediate_size, bitorder="little")
        return bits.view(np.bool_)

    def layer(self, index: int) -> BoolArray:
        """Bool `[intermediate_size]`: one layer of `to_dense`."""
        bits = np.unpackbits(self.bits[index], count=self.intermediate_size, bitorder="little")
        return bits.view(np.bool_)

    def kept_indices(self) -> npt.NDArray[np.int32]:
        """Int32 `[num_layers, kept]`, ascending in each layer."""
        return np.nonzero(self.to_dense())[1].astype(np.int32).reshape(self.num_layers, self.kept)

    def jaccard(self, other: Mask) -> float:
        """Intersection over union with another mask of the same shape, the mean over layers.

        Raises `MaskShapeError` where the shapes differ.
        """
        _check_same_shape(self, other)
        mine, theirs = self.to_dense(), other.to_dense()
        shared = (mine & theirs).sum(axis=1)  # [num_layers]
        return float(np.mean(shared / (mine | theirs).sum(axis=1)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.intermediate_size == other.intermediate_size and np.array_equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.intermediate_size, self.bits.tobytes()))


def union(masks: Iterable[Mask]) -> BoolArray:
    """Bool `[num_layers, intermediate_size]`, true where any of the masks keeps the neuron.

    An array and no `Mask`: a union's layers need not keep the same number. Raises `MaskShapeError` where
    shapes differ, `ValueError` for no masks at all.
    """
    first, *rest = masks
    bits = first.bits.copy()
    for mask in rest:
        _check_same_shape(first, mask)
        bits |= mask.bits
    return np.unpackbits(bits, axis=1, count=first.intermediate_size, bitorder="little").view(np.bool_)


def chance_jaccard(kept: int, intermediate_size: int) -> float:
    """The Jaccard index that unrelated masks of this size have: q / (2 - q), with q the kept fraction."""
    return kept / (2 * intermediate_size - kept)


def round_kept(intermediate_size: int, sparsity: float) -> int:
    """Neurons to keep a layer: the multiple of 32 nearest to what `sparsity` asks, at least 32.

    Midway between two multiples it takes the smaller, so that presets stay apart in narrow layers. Layers of
    fewer than 64 neurons are rounded to whole neurons. Raises `SettingError` for a sparsity outside [0, 1).
    """
    if not (math.isfinite(sparsity) and 0 <= sparsity < 1):
        raise SettingError("sparsity", f"{sparsity} is not a number from 0 up to, not including, 1")
    multiple = _KEPT_MULTIPLE if intermediate_size >= _SMALL_LAYER else 1
    wanted = intermediate_size * (1 - sparsity)
    rounded = math.ceil(wanted / multiple - 0.5 - 1e-9) * multiple
    return intermediate_size if sparsity == 0 else min(max(rounded, multiple), intermediate_size)


def check_bits(bits: Bits, intermediate_size: int) -> None:
    """Raise for bits of another shape or dtype, for a set padding bit, and for a layer that keeps nothing."""
    if intermediate_size < 1:
        raise MaskShapeError(f"a layer has at least one neuron, not {intermediate_size}")
    num_bytes = -(-intermediate_size // 8)
    if bits.dtype != np.uint8 or bits.ndim != 2 or bits.shape[0] < 1 or bits.shape[1] != num_bytes:
        raise MaskShapeError(
            f"the mask of {intermediate_size} neurons is uint8 [layers, {num_bytes}]; "
            f"this is {bits.dtype} {list(bits.shape)}"
        )
    padding = np.unpackbits(bits[:, -1:], axis=1, bitorder="little")[:, (intermediate_size - 1) % 8 + 1 :]
    if padding.any():
        layer, bit = (int(position[0]) for position in np.nonzero(padding))
        raise MaskIndexError(
            f"layer {layer} keeps neuron {intermediate_size + bit}, and the last is {intermediate_size - 1}",
            layer,
        )
    kept_nothing = np.flatnonzero(~bits.any(axis=1))
    if kept_nothing.size:
        raise EmptyLayer(int(kept_nothing[0]))


def check_uniform(bits: Bits) -> None:
    """Raise `MaskShapeError` where two layers keep different numbers of neurons."""
    counts = np.unpackbits(bits, axis=1).sum(axis=1, dtype=np.int64)  # [num_layers]
    other = np.flatnonzero(counts != counts[0])
    if other.size:
        layer = int(other[0])
        raise MaskShapeError(
            f"every layer keeps the same number of neurons; layer 0 keeps {counts[0]}, "
            f"layer {layer} keeps {counts[layer]}"
        )


def _integer_matrix(indices: npt.ArrayLike) -> npt.NDArray[np.integer]:
    try:
        matrix = np.asarray(indices)
    except (ValueError, OverflowError) as error:
        raise MaskShapeError(f"kept indices are integers [layers, kept], as many in every layer: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] < 1:
        raise MaskShapeError(f"kept indices are integers [layers, kept]; this is of shape {list(matrix.shape)}")
    if matrix.dtype == np.uint64:  # beyond int64 is out of any range
        matrix = np.minimum(matrix, np.uint64(np.iinfo(np.int64).max)).astype(np.int64)
    if matrix.size and not np.issubdtype(matrix.dtype, np.integer):
        raise MaskFormatError(f"kept indices are integers; these are {matrix.dtype}")
    return matrix


def _check_indices(kept: npt.NDArray[np.integer], intermediate_size: int) -> None:
    outside = np.argwhere((kept < 0) | (kept >= intermediate_size))
    if outside.size:
        layer, column = (int(part) for part in outside[0])
        raise MaskIndexError(
            f"layer {layer} keeps neuron {kept[layer, column]}, not one of 0 to {intermediate_size - 1}",
            layer,
        )
    ordered = np.sort(kept, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if twice.size:
        layer, column = (int(part) for part in twice[0])
        raise MaskIndexError(f"layer {layer} keeps neuron {ordered[layer, column]} twice", layer)


def _check_same_shape(mask: Mask, other: Mask) -> None:
    if (mask.num_layers, mask.intermediate_size) != (other.num_layers, other.intermediate_size):
        raise MaskShapeError(
            f"the masks differ in shape: {mask.num_layers} x {mask.intermediate_size} neurons against "
            f"{other.num_layers} x {other.intermediate_size}"
        )


def _read_only(array: Bits) -> Bits:
    own = np.array(array, order="C", copy=True)
    own.flags.writeable = False
    return own
