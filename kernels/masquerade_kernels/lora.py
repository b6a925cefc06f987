"""Low-rank updates of the persona FFN: what a persona's rows get beside the pack's own products.

`gate += s (x A_gᵀ) B_gᵀ`, up likewise, and `down += s ((h ⊙ c) A_dᵀ) B_dᵀ`, over the kept neurons alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from masquerade_masks import Attached, SubNetwork
from masquerade_masks.attached import lora_name


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One layer's factors as they are stored, over every neuron: each an A `[rank, in]` and a B `[out, rank]`."""

    gate: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    scale: float


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's factors over a pack's neurons U; the scale is in the B sides, and dropped neurons are zeros."""

    gate_up_a: torch.Tensor  # [2 rank, hidden]: gate's first
    gate_b: torch.Tensor  # [|U|, rank]
    up_b: torch.Tensor  # [|U|, rank]
    down_a: torch.Tensor  # [rank, |U|]
    down_b: torch.Tensor  # [hidden, rank]

    @property
    def num_bytes(self) -> int:
        parts = (self.gate_up_a, self.gate_b, self.up_b, self.down_a, self.down_b)
        return sum(part.nbytes for part in parts)


@dataclass(frozen=True, slots=True)
class LoraRows:
    """One persona's rows of a segment, and its factors over the segment's pack."""

    rows: slice | torch.Tensor  # int64 [num_rows] where they do not lie together
    layers: tuple[LoraLayer, ...]

    def add_gate_up(self, layer: int, hidden: torch.Tensor, gate_up: torch.Tensor) -> None:
        """Update `gate_up` `[segment's rows, 2 |U|]`, computed from `hidden` `[segment's rows, hidden]`."""
        own, num_neurons = self.layers[layer], gate_up.shape[1] // 2
        gate, up = F.linear(hidden[self.rows], own.gate_up_a).chunk(2, dim=-1)
        self._add(gate_up[:, :num_neurons], F.linear(gate, own.gate_b))
        self._add(gate_up[:, num_neurons:], F.linear(up, own.up_b))

    def add_down(self, layer: int, activations: torch.Tensor, output: torch.Tensor) -> None:
        """Update `output` `[segment's rows, hidden]`, computed from `activations` `[segment's rows, |U|]`."""
        own = self.layers[layer]
        self._add(output, F.linear(F.linear(activations[self.rows], own.down_a), own.down_b))

    def _add(self, output: torch.Tensor, update: torch.Tensor) -> None:
        if isinstance(self.rows, slice):
            output[self.rows].add_(update)
        else:
            output.index_add_(0, self.rows, update)


def lora_rows(
    personas: Sequence[str | None], loras: Mapping[str, tuple[LoraLayer, ...]], device: torch.device
) -> tuple[LoraRows, ...]:
    """The rows of each persona that has updates, from every row's digest."""
    rows: dict[str, list[int]] = {}
    for row, digest in enumerate(personas):
        if digest in loras:
            rows.setdefault(str(digest), []).append(row)
    return tuple(LoraRows(_indices(own, device), loras[digest]) for digest, own in rows.items())


def _indices(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    first, last = rows[0], rows[-1]
    return slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device)


def lora_of(subnetwork: SubNetwork) -> Attached | None:
    """Its low-rank updates, None where it has none."""
    assert subnetwork.weights is not None or not subnetwork.attached, (
        "attached weights are loaded before they are served"
    )
    return subnetwork.weights if subnetwork.weights is not None and subnetwork.weights.kind == "lora" else None


def lora_factors(lora: Attached, layer: int) -> LoraFactors:
    """One layer's factors in float32, as the oracles take them."""

    def pair(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.from_numpy(lora.float32(lora_name(layer, part, side))) for side in ("A", "B"))
        return a, b

    return LoraFactors(pair("gate_proj"), pair("up_proj"), pair("down_proj"), lora.scale)


def lora_layer(
    subnetwork: SubNetwork,
    layer: int,
    neurons: npt.NDArray[np.int64] | None,  # U, ascending; None: every neuron
    dtype: torch.dtype,
    device: torch.device,
) -> LoraLayer | None:
    """One layer's updates, laid out over U; None where the sub-network has none."""
    lora = lora_of(subnetwork)
    if lora is None:
        return None
    factors = lora_factors(lora, layer)
    kept = torch.from_numpy(subnetwork.mask.layer(layer)).float()  # [intermediate]
    chosen = slice(None) if neurons is None else torch.from_numpy(neurons)
    scaled = (factors.scale * kept)[:, None]

    def laid_out(part: torch.Tensor) -> torch.Tensor:
        return part.to(device, dtype).contiguous()

    return LoraLayer(
        laid_out(torch.cat([factors.gate[0], factors.up[0]])),
        laid_out((scaled * factors.gate[1])[chosen]),
        laid_out((scaled * factors.up[1])[chosen]),
        laid_out((factors.down[0] * kept)[:, chosen]),
        laid_out(factors.scale * factors.down[1]),
    )


def lora_bytes(subnetwork: SubNetwork, num_neurons: int, itemsize: int) -> int:
    """What the updates hold over packs of `num_neurons` in all layers together."""
    lora, shape = lora_of(subnetwork), subnetwork.shape
    if lora is None:
        return 0
    assert lora.rank is not None
    return itemsize * lora.rank * 3 * (num_neurons + shape.num_layers * shape.hidden_size)
