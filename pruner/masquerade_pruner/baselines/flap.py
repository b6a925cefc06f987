"""FLAP (arXiv 2312.11983): drop the neurons that fluctuate least, and put their mean back as a bias.

As in the authors' code, statistics are the dense base's. Their search also moves sizes between layers and into
attention; here every layer keeps the same number of neurons (their `UL-UM`, FFN only).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from masquerade_engine.seams import PersonaFFN
from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.importance import Fluctuation, down_weights, fluctuation, weighted_variance
from masquerade_pruner.tree import Forward, Tree, TreeContext, run_tree


def flap(setting: Setting) -> Baseline:
    """The neurons with the largest WIFV, without the bias."""
    return _flap(setting)[0]


def flap_with_bias(setting: Setting) -> Baseline:
    """The same mask, with the dropped neurons' mean output as a bias of every layer; the bias counts as parameters."""
    plain, statistics = _flap(setting)
    assert plain.mask is not None
    bias = compensation(setting.model, statistics, plain.mask)
    forward = masked_with_bias(setting.model, plain.mask, bias)
    return replace(plain, forward=forward, num_dropped=plain.num_dropped - bias.numel())


def _flap(setting: Setting) -> tuple[Baseline, Fluctuation]:
    statistics = fluctuation(setting.model, setting.examples)
    return keep_best(setting, weighted_variance(setting.model, statistics)), statistics


def compensation(model: torch.nn.Module, statistics: Fluctuation, mask: torch.Tensor) -> torch.Tensor:
    """What the dropped neurons add to each layer's output in the mean, `[layers, hidden]` fp64."""
    dropped = statistics.mean * (1 - mask.double())
    return torch.stack([weight.double().cpu() @ row for weight, row in zip(down_weights(model), dropped, strict=True)])


def masked_with_bias(model: torch.nn.Module, mask: torch.Tensor, bias: torch.Tensor) -> Forward:
    """The base under a mask, with `bias` `[layers, hidden]` added to the FFNs' outputs."""
    return lambda tree: run_tree(model, tree, _BiasedContext(tree, mask, bias))


class _BiasedContext(TreeContext):
    def __init__(self, tree: Tree, mask: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(tree, mask)
        self._layer_bias = bias

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        output = super().ffn(module, hidden)
        return output + self._layer_bias[module.layer].to(output)
