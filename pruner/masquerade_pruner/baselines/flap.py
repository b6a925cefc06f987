"""FLAP (arXiv 2312.11983): drop the neurons that fluctuate least, and put their mean back as a bias.

WIFV, the weighted input feature variance, is a neuron's variance over the calibration tokens times the squared norm of
its column of the down projection. As in the authors' code, statistics are the dense base's. Their search also moves
sizes between layers and into attention; here every layer keeps the same number of neurons (their `UL-UM`, FFN only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from masquerade_engine.seams import PersonaFFN
from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.examples import Example
from masquerade_pruner.importance import down_weights, observe
from masquerade_pruner.tree import ActivationWatch, Forward, Tree, TreeContext, run_tree


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """Each neuron over the calibration tokens, `[layers, intermediate]` fp64."""

    mean: torch.Tensor
    variance: torch.Tensor


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


def fluctuation(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> Fluctuation:
    """Mean and variance of every neuron's activation in the dense base."""
    down = down_weights(model)
    moments = _Moments(len(down), down[0].shape[1])
    observe(model, examples, moments, batch=batch)
    mean = moments.sums / moments.num_tokens
    return Fluctuation(mean, (moments.squares / moments.num_tokens - mean.square()).clamp_min(0))


def weighted_variance(model: torch.nn.Module, statistics: Fluctuation) -> torch.Tensor:
    """WIFV, `[layers, intermediate]` fp64."""
    columns = [weight.double().square().sum(dim=0).cpu() for weight in down_weights(model)]
    return statistics.variance * torch.stack(columns)


def compensation(model: torch.nn.Module, statistics: Fluctuation, mask: torch.Tensor) -> torch.Tensor:
    """What the dropped neurons add to each layer's output in the mean, `[layers, hidden]` fp64."""
    dropped = statistics.mean * (1 - mask.double())
    return torch.stack([weight.double().cpu() @ row for weight, row in zip(down_weights(model), dropped, strict=True)])


def masked_with_bias(model: torch.nn.Module, mask: torch.Tensor, bias: torch.Tensor) -> Forward:
    """The base under a mask, with `bias` `[layers, hidden]` added to the FFNs' outputs."""
    return lambda tree: run_tree(model, tree, _BiasedContext(tree, mask, bias))


class _Moments(ActivationWatch):
    """First and second moments, in fp64 so that a variance is left where a mean is large."""

    def __init__(self, num_layers: int, intermediate_size: int) -> None:
        super().__init__(num_layers, intermediate_size)
        self.sums = torch.zeros(num_layers, intermediate_size, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sums)

    def see(self, layer: int, activations: torch.Tensor) -> None:
        exact = activations.detach()[0].double()
        self.sums[layer] += exact.sum(dim=0).cpu()
        self.squares[layer] += exact.square().sum(dim=0).cpu()
        self.num_tokens += len(exact) if layer == 0 else 0


class _BiasedContext(TreeContext):
    def __init__(self, tree: Tree, mask: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(tree, mask)
        self._layer_bias = bias

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        output = super().ffn(module, hidden)
        return output + self._layer_bias[module.layer].to(output)
