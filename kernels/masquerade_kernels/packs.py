"""Packs: the FFN rows of a sorted set of neurons, laid out for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from masquerade_kernels.linear import PackedLinear
from masquerade_masks import SubNetwork


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
class LayerPack:
    """One layer over the pack's neurons U."""

    gate_up: PackedLinear  # hidden -> 2 |U|: the gates first
    down: PackedLinear  # |U| -> hidden
    gain: torch.Tensor | None = None  # float32 [|U|], of the one persona of a compact pack
    bias: torch.Tensor | None = None  # float32 [hidden], the same persona's


@dataclass(frozen=True, slots=True)
class Pack:
    """All layers over the neurons U of one persona (compact), or over every neuron (dense)."""

    digest: str | None  # the one persona of a compact pack; None: dense
    neurons: torch.Tensor | None  # int32 [num_layers, |U|], ascending; None: all of them
    layers: tuple[LayerPack, ...]

    @property
    def num_bytes(self) -> int:
        """What the pack's weights hold of memory."""
        return sum(layer.gate_up.num_bytes + layer.down.num_bytes for layer in self.layers)


def dense_pack(weights: FFNWeights) -> Pack:
    """The base itself, in the dtype and on the device that the weights have."""
    return Pack(None, None, tuple(_layer_pack(layer) for layer in weights.layers()))


def compact_pack(
    weights: FFNWeights,
    subnetwork: SubNetwork,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Pack:
    """One persona's kept neurons, copied out of the base. Gains stay beside the weights, in float32."""
    neurons = torch.from_numpy(subnetwork.mask.kept_indices().copy())  # int32 [num_layers, kept]
    gains = None if subnetwork.gain is None else torch.from_numpy(subnetwork.gain.copy()).float().to(device)
    biases = subnetwork.biases()
    bias_rows = None if biases is None else torch.from_numpy(biases).to(device)
    layers = []
    for index, layer in enumerate(weights.layers()):
        kept = layer.select(neurons[index].long().to(layer.gate.device))
        converted = FFNLayer(*(part.to(device, dtype) for part in (kept.gate, kept.up, kept.down)))
        layers.append(
            _layer_pack(
                converted,
                gain=None if gains is None else gains[index],
                bias=None if bias_rows is None else bias_rows[index],
            )
        )
    return Pack(subnetwork.digest, neurons, tuple(layers))


def compact_bytes(subnetwork: SubNetwork, dtype: torch.dtype) -> int:
    """What `compact_pack` will hold: three matrices of `[kept, hidden]` a layer."""
    shape = subnetwork.shape
    return 3 * shape.num_layers * subnetwork.mask.kept * shape.hidden_size * dtype.itemsize


def _layer_pack(layer: FFNLayer, *, gain: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> LayerPack:
    gate_up = PackedLinear(torch.cat([layer.gate, layer.up]))
    return LayerPack(gate_up, PackedLinear(layer.down), gain, bias)
