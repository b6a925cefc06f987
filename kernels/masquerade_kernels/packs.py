"""Packs: the FFN rows of a sorted set of neurons, laid out for the device, with the coefficients of its personas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from masquerade_kernels.gathered import (
    GatheredLayer,
    GatheredLayerPack,
    GatheredWeights,
    TransposedLinear,
    gathered_layer_pack,
)
from masquerade_kernels.linear import DotLinear, Linear, PackedLinear, can_dot, pack_linear
from masquerade_kernels.lora import LoraLayer, lora_bytes, lora_layer, lora_of
from masquerade_kernels.rows import RowOps
from masquerade_masks import SubNetwork
from masquerade_masks.attached import PARTS, full_name

FloatArray = npt.NDArray[np.float32]

# A cast's union counts its neurons in so many steps to all, so that its layers share a few shapes: oneDNN compiles a
# kernel for each. Our own loops take whole vectors of any number.
_UNION_STEPS = 24
_VECTOR = 16


@dataclass(frozen=True, slots=True)
class FFNLayer:
    """One layer's unpacked weights, in any float dtype."""

    gate: torch.Tensor  # [intermediate, hidden]
    up: torch.Tensor  # [intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]

    def select(self, neurons: torch.Tensor) -> FFNLayer:
        """The rows (of down: columns) of `neurons`, int64 `[num_neurons]`."""
        return FFNLayer(
            self.gate.index_select(0, neurons),
            self.up.index_select(0, neurons),
            self.down.index_select(1, neurons),
        )


class FFNWeights(Protocol):
    """Where a base's FFN weights come from, one layer at a time."""

    def layers(self) -> Iterator[FFNLayer]:
        """The layers in order; each may be freed once it has been read."""
        ...


@dataclass(frozen=True, slots=True)
class PackFormat:
    """How a pack's weights are held.

    Where `gathered` is given they are not: packs read the base's own rows, but for a persona with own FFN weights.
    """

    dtype: torch.dtype
    device: torch.device
    int8: bool = False
    gathered: GatheredWeights | None = None

    def linear(self, weight: torch.Tensor) -> Linear:
        """`weight` `[out_features, in_features]`, laid out."""
        return pack_linear(weight.to(self.device, self.dtype), int8=self.int8)

    @property
    def bytes_per_weight(self) -> int:
        return 1 if self.int8 else self.dtype.itemsize

    def gathers(self, members: Sequence[SubNetwork]) -> bool:
        """Whether the pack of these members holds an index list in place of weights."""
        return self.gathered is not None and not members[0].has_own_ffn

    def union_step(self, intermediate_size: int) -> int:
        """A cast's copied pack has a multiple of so many neurons a layer."""
        dots = not self.int8 and can_dot(torch.empty(0, 2, dtype=self.dtype, device=self.device))
        return _VECTOR if dots else _union_step(intermediate_size)

    def holds(self, member: SubNetwork) -> bool:
        """Whether packs are made for it: gathered kernels take no low-rank updates, so those run on the dense pack."""
        return not self.gathers([member]) or lora_of(member) is None


@dataclass(frozen=True, slots=True)
class LayerPack:
    """One layer over the pack's neurons U."""

    gate_up: Linear  # hidden -> 2 |U|: the gates first
    down: Linear | TransposedLinear  # |U| -> hidden
    coefficients: torch.Tensor | None = None  # float32 [num_members, |U|]; None: all of them 1
    biases: torch.Tensor | None = None  # float32 [num_members, hidden]

    def activations(
        self, x: torch.Tensor, coefficients: torch.Tensor | None, personas: torch.Tensor | None, rows: RowOps
    ) -> torch.Tensor:
        """`silu(gate) * up * coefficient` of `[num_rows, hidden]`: `[num_rows, |U|]`; as `RowOps.swiglu` takes them."""
        if isinstance(self.gate_up, DotLinear) and self.gate_up.can_gate:
            return self.gate_up.gated(x, coefficients, personas)
        return rows.swiglu(self.gate_up(x), coefficients, personas)

    @property
    def num_bytes(self) -> int:
        tables = sum(0 if table is None else table.nbytes for table in (self.coefficients, self.biases))
        return self.gate_up.num_bytes + self.down.num_bytes + tables


@dataclass(frozen=True, slots=True)
class Pack:
    """All layers over the neurons U of one persona (compact), of several (cast), or over every neuron (dense)."""

    layers: tuple[LayerPack | GatheredLayerPack, ...]
    members: tuple[str, ...] | None  # digests, in the order of the coefficients' rows; None: dense, and for anyone
    fraction: float  # |U| over all neurons, the mean over layers
    loras: Mapping[str, tuple[LoraLayer, ...]] = field(default_factory=dict)  # by digest, of members that have some

    @property
    def num_bytes(self) -> int:
        """What the pack holds of memory; of a gathered one, beside the base's weights."""
        loras = sum(layer.num_bytes for lora in self.loras.values() for layer in lora)
        return loras + sum(layer.num_bytes for layer in self.layers)


def dense_pack(weights: FFNWeights, form: PackFormat) -> Pack:
    """The base itself."""
    return Pack(tuple(_layer_pack(layer, form) for layer in weights.layers()), None, 1.0)


def gathered_dense_pack(weights: GatheredWeights) -> Pack:
    """The base itself, on the very tensors that gathered packs read."""
    layers = (LayerPack(PackedLinear(layer.gate_up), TransposedLinear(layer.down_t)) for layer in weights.layers)
    return Pack(tuple(layers), None, 1.0)


def member_pack(
    weights: FFNWeights,
    members: Sequence[SubNetwork],
    form: PackFormat,
    between_layers: Callable[[], None] = lambda: None,
) -> Pack:
    """The union of the members' masks, copied or gathered: of one member its compact pack, else a cast's.

    A member with FFN weights of its own (`full`) is alone, and its pack is made of those.
    Gains and biases stay beside the weights, in float32, and low-rank updates in the pack's dtype.
    `between_layers` is called after each, for those who want to make way or give up (what it raises passes through).
    """
    assert len(members) == 1 or not any(member.has_own_ffn for member in members), "own weights are shared with nobody"
    assert all(form.holds(member) for member in members), "low-rank updates run on the dense pack here"
    unions = _pack_neurons(members, form)
    scales = [member.coefficients() for member in members]
    biases = [member.biases() for member in members]
    layers: list[LayerPack | GatheredLayerPack] = []
    loras: dict[str, list[LoraLayer]] = {}
    for index, layer in enumerate(_layers_of(weights, members, unions, form)):
        neurons = unions[index]
        coefficients = np.stack([scale[index][neurons] for scale in scales])
        own = None if (coefficients == 1.0).all() else coefficients
        rows = _bias_rows(biases, index)
        if isinstance(layer, GatheredLayer):
            layers.append(gathered_layer_pack(layer, neurons.astype(np.int32), own, rows, layer=index))
        else:
            layers.append(_layer_pack(layer, form, own, rows))
        for member in members:
            lora = lora_layer(member, index, neurons, form.dtype, form.device)
            if lora is not None:
                loras.setdefault(member.digest, []).append(lora)
        between_layers()
    return Pack(
        tuple(layers),
        tuple(member.digest for member in members),
        _fraction(unions, members[0]),
        {digest: tuple(lora) for digest, lora in loras.items()},
    )


def _layers_of(
    weights: FFNWeights,
    members: Sequence[SubNetwork],
    unions: Sequence[npt.NDArray[np.int64]],
    form: PackFormat,
) -> Iterator[FFNLayer | GatheredLayer]:
    """The layers over U: the base's rows, copied or where they are, or the member's own."""
    if form.gathers(members):
        assert form.gathered is not None
        yield from form.gathered.layers
    elif members[0].has_own_ffn:
        own = members[0].weights
        assert own is not None, "attached weights are loaded before they are served"
        for index in range(members[0].shape.num_layers):
            yield FFNLayer(*(torch.from_numpy(own.float32(full_name(index, part))) for part in PARTS))
    else:
        for neurons, layer in zip(unions, weights.layers(), strict=True):
            yield layer.select(torch.from_numpy(neurons).to(layer.gate.device))


def _pack_neurons(members: Sequence[SubNetwork], form: PackFormat) -> list[npt.NDArray[np.int64]]:
    """U a layer; gathered kernels are compiled for no |U|, so theirs is the masks' union and no more."""
    intermediate_size = members[0].shape.intermediate_size
    return union_neurons(members, 1 if form.gathers(members) else form.union_step(intermediate_size))


def union_neurons(members: Sequence[SubNetwork], step: int | None = None) -> list[npt.NDArray[np.int64]]:
    """The neurons of the members' pack, ascending: int64 `[|U|]` a layer.

    Those that any member keeps; of a cast, with a few that none does up to a whole number of steps (None: as on most
    devices).
    """
    step = step or _union_step(members[0].shape.intermediate_size)
    union = np.bitwise_or.reduce([member.mask.bits for member in members])
    flags = np.unpackbits(union, axis=1, bitorder="little", count=members[0].shape.intermediate_size)
    if len(members) > 1:
        flags = np.stack([_rounded_up(layer, step) for layer in flags])
    return [np.flatnonzero(layer).astype(np.int64) for layer in flags]


def _union_step(intermediate_size: int) -> int:
    return -(-intermediate_size // _UNION_STEPS)


def _rounded_up(flags: npt.NDArray[np.uint8], step: int) -> npt.NDArray[np.uint8]:
    """A layer's flags `[intermediate]` with the first of the unset ones set, up to a whole number of steps."""
    wanted = -int(flags.sum()) % step
    return np.where(np.cumsum(flags == 0) <= wanted, np.uint8(1), flags)


def pack_bytes(members: Sequence[SubNetwork], form: PackFormat) -> int:
    """What `member_pack` will hold: three matrices of `[|U|, hidden]`, coefficients, biases, low-rank updates, a layer.

    In place of the matrices a gathered pack holds 4 bytes a neuron.
    """
    shape = members[0].shape
    num_neurons = (
        members[0].mask.kept * shape.num_layers
        if len(members) == 1
        else sum(len(layer) for layer in _pack_neurons(members, form))
    )
    weights = 4 if form.gathers(members) else 3 * shape.hidden_size * form.bytes_per_weight
    coefficients = 4 * len(members) if len(members) > 1 or members[0].gain is not None else 0
    biased = any(member.bias is not None for member in members)
    biases = 4 * len(members) * shape.num_layers * shape.hidden_size if biased else 0
    loras = sum(lora_bytes(member, num_neurons, form.dtype.itemsize) for member in members)
    return loras + biases + num_neurons * (weights + coefficients)


def union_fraction(members: Sequence[SubNetwork]) -> float:
    """The share of all neurons that the members' union takes."""
    return _fraction(union_neurons(members), members[0])


def _bias_rows(biases: Sequence[FloatArray | None], layer: int) -> FloatArray | None:
    """Float32 `[num_members, hidden]`, zeros for members without; None where no member has any."""
    rows = {index: bias[layer] for index, bias in enumerate(biases) if bias is not None}
    if not rows:
        return None
    table = np.zeros((len(biases), *next(iter(rows.values())).shape), np.float32)
    for index, row in rows.items():
        table[index] = row
    return table


def _fraction(unions: Sequence[npt.NDArray[np.int64]], member: SubNetwork) -> float:
    return sum(len(layer) for layer in unions) / (member.shape.num_layers * member.shape.intermediate_size)


def _layer_pack(
    layer: FFNLayer, form: PackFormat, coefficients: FloatArray | None = None, biases: FloatArray | None = None
) -> LayerPack:
    gate_up = form.linear(torch.cat([layer.gate, layer.up]))
    tables = (None if one is None else torch.from_numpy(one).to(form.device) for one in (coefficients, biases))
    return LayerPack(gate_up, form.linear(layer.down), *tables)
