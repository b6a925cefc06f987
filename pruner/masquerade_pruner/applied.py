"""A stored sub-network as a change of the base that can be scored: its mask, gains and biases, as it is served."""

from __future__ import annotations

import torch

from masquerade_engine.seams import PersonaFFN
from masquerade_masks import SettingError, SubNetwork
from masquerade_pruner.tree import Forward, Tree, TreeContext, head_weight, run_tree


def applied(model: torch.nn.Module, subnetwork: SubNetwork) -> Forward:
    """The base under a sub-network. Raises `SettingError` for attached weights."""
    refuse_attached(subnetwork)
    device = head_weight(model).device
    coefficients = torch.from_numpy(subnetwork.coefficients()).to(device)
    biases = subnetwork.biases()
    shifts = None if biases is None else torch.from_numpy(biases).to(device)
    return lambda tree: run_tree(model, tree, _SubNetworkContext(tree, coefficients, shifts))


def refuse_attached(subnetwork: SubNetwork) -> None:
    """Raise `SettingError` for a sub-network that holds more than its mask, gains and biases."""
    if subnetwork.attached:
        raise SettingError("recovery", "a sub-network with attached weights (lora, full) cannot be evaluated yet")


class _SubNetworkContext(TreeContext):
    """Tree attention, and coefficients applied in fp32 as the engine does."""

    def __init__(self, tree: Tree, coefficients: torch.Tensor, biases: torch.Tensor | None) -> None:
        super().__init__(tree)
        self._coefficients = coefficients  # [layers, intermediate] fp32
        self._biases = biases  # [layers, hidden] fp32

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        activations = module.activations(hidden).float() * self._coefficients[module.layer]
        output: torch.Tensor = module.get_submodule("down_proj")(activations.to(hidden.dtype))
        return output if self._biases is None else (output.float() + self._biases[module.layer]).to(output.dtype)
