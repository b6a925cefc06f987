"""A stored sub-network as a change of the base that can be scored: all that it holds, as it is served."""

from __future__ import annotations

from typing import Literal

import torch

from masquerade_masks import Attached, SettingError, SubNetwork
from masquerade_masks.attached import PARTS, full_name, lora_name
from masquerade_pruner.changes import Change
from masquerade_pruner.tree import Forward, head_weight

_SIDES: tuple[Literal["A", "B"], ...] = ("A", "B")


def applied(model: torch.nn.Module, subnetwork: SubNetwork) -> Forward:
    """The base under a sub-network: mask, gains, biases and attached weights.

    Raises `SettingError` for attached weights that are not loaded.
    """
    refuse_unloaded(subnetwork)
    head, weights = head_weight(model), subnetwork.weights
    kept = torch.from_numpy(subnetwork.mask.kept_indices()).long()  # [layers, kept]
    tensors = {
        name: torch.from_numpy(array.astype("float32"))
        for name, array in (("gain", subnetwork.gain), ("bias", subnetwork.bias))
        if array is not None
    }
    if weights is not None:
        stack = _stacked_lora if weights.kind == "lora" else _stacked_full
        tensors |= {name: tensor.to(head.dtype) for name, tensor in stack(weights, kept).items()}
    on_device = {name: tensor.to(head.device) for name, tensor in tensors.items()}
    scale = weights.scale if weights is not None and weights.kind == "lora" else 1.0
    return Change(model, kept.to(head.device), on_device, scale).forward


def refuse_unloaded(subnetwork: SubNetwork) -> None:
    """Raise `SettingError` for a sub-network that names attached weights and does not hold them."""
    if subnetwork.attached and subnetwork.weights is None:
        raise SettingError(
            "recovery",
            f"this sub-network's {subnetwork.attached[0][0]} weights are not at hand; use its data directory",
        )


def _stacked_full(weights: Attached, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{part}.weight": torch.stack([_tensor(weights, full_name(layer, part)) for layer in range(len(kept))])
        for part in PARTS
    }


def _stacked_lora(weights: Attached, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """The factors over the kept neurons: those are in the rows of gate's and up's B, and the columns of down's A."""
    stacked: dict[str, torch.Tensor] = {}
    for part in PARTS:
        down, up = ([_tensor(weights, lora_name(layer, part, side)) for layer in range(len(kept))] for side in _SIDES)
        if part == "down_proj":
            down = [one[:, neurons] for one, neurons in zip(down, kept, strict=True)]
        else:
            up = [one[neurons] for one, neurons in zip(up, kept, strict=True)]
        stacked |= {f"{part}.lora_A": torch.stack(down), f"{part}.lora_B": torch.stack(up)}
    return stacked


def _tensor(weights: Attached, name: str) -> torch.Tensor:
    return torch.from_numpy(weights.float32(name))
