"""The FFN weights of a persona over its kept neurons alone: what a smaller checkpoint holds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from masquerade_masks import Attached, AttachedNotFound, SubNetwork
from masquerade_masks.attached import full_name, lora_name

Projection = Literal["gate_proj", "up_proj", "down_proj"]

PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")


class PrunedFFN:
    """Dropping neuron i drops row i of gate and up and column i of down.

    Gains are folded into down, here alone. `lora` is merged; `full` stands in for the base's weights. Raises
    `AttachedNotFound` for a sub-network whose attached weights are not loaded.
    """

    def __init__(self, subnetwork: SubNetwork) -> None:
        if subnetwork.attached and subnetwork.weights is None:
            raise AttachedNotFound(*subnetwork.attached[0])
        self._kept = torch.from_numpy(subnetwork.mask.kept_indices()).long()  # [layers, kept]
        self._gains = None if subnetwork.gain is None else torch.from_numpy(subnetwork.gain.astype(np.float32))
        self._weights = subnetwork.weights

    def kept(self, layer: int) -> torch.Tensor:
        """Int64 `[kept]`, ascending."""
        return self._kept[layer]

    def weight(self, layer: int, projection: Projection, base: torch.Tensor) -> torch.Tensor:
        """Float32 on the CPU: gate and up `[kept, hidden]` of `[intermediate, hidden]`, down `[hidden, kept]`."""
        if self._weights is not None and self._weights.kind == "full":
            weight = torch.from_numpy(self._weights.float32(full_name(layer, projection)))
        else:
            kept = self._kept[layer].to(base.device)
            weight = (base[:, kept] if projection == "down_proj" else base[kept]).float().cpu()
            if self._weights is not None:
                a, b = self._low_rank(layer, projection, self._weights)
                weight = weight + self._weights.scale * (b @ a)
        return self._with_gains(weight, layer, projection)

    def low_rank(self) -> Attached:
        """The low-rank updates over the kept neurons alone, float32, gains folded as in `weight`."""
        lora = self._weights
        assert lora is not None, "of lora only"
        tensors = {}
        for layer in range(len(self._kept)):
            for projection in PROJECTIONS:
                a, b = self._low_rank(layer, projection, lora)
                tensors[lora_name(layer, projection, "A")] = self._with_gains(a, layer, projection).numpy()
                tensors[lora_name(layer, projection, "B")] = b.contiguous().numpy()
        return Attached("lora", tensors, lora.alpha, lora.rank)

    def _low_rank(self, layer: int, projection: Projection, lora: Attached) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[rank, in]` and B `[out, rank]`, before gains."""
        a = torch.from_numpy(lora.float32(lora_name(layer, projection, "A")))
        b = torch.from_numpy(lora.float32(lora_name(layer, projection, "B")))
        kept = self._kept[layer]
        return (a[:, kept], b) if projection == "down_proj" else (a, b[kept])

    def _with_gains(self, over_kept: torch.Tensor, layer: int, projection: Projection) -> torch.Tensor:
        """Of a matrix whose columns are the kept neurons, if it is of down."""
        if projection != "down_proj" or self._gains is None:
            return over_kept.contiguous()
        return (over_kept * self._gains[layer]).contiguous()
