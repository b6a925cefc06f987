"""Depth pruning by block influence (ShortGPT, arXiv 2403.03853): whole decoder layers, or whole FFN blocks.

A block's influence is 1 - cos(its input, its output) in the mean over tokens, both with the residual stream; the least
influential blocks go, in one shot from the dense base's statistics. So many go as come closest in parameters to the
setting's masks; between two equally close numbers the smaller, which favours this baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from masquerade_engine.seams import decoder_layers, persona_ffns
from masquerade_pruner.baselines.base import Baseline, Setting
from masquerade_pruner.baselines.sharing import with_children
from masquerade_pruner.examples import Example
from masquerade_pruner.importance import down_weights
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import TreeContext, masked, run_tree


@dataclass(frozen=True, slots=True)
class Influence:
    """Block influence, each `[layers]` fp64."""

    layers: torch.Tensor
    ffns: torch.Tensor


def drop_layers(setting: Setting) -> Baseline:
    """The base without its least influential decoder layers."""
    layers = decoder_layers(setting.model)
    size = _num_parameters(layers[0])
    number = closest_number(setting.num_dropped, size, len(layers))
    dropped = _least(block_influence(setting.model, setting.examples).layers, number)
    return Baseline(masked(without_layers(setting.model, dropped)), number * size)


def drop_ffns(setting: Setting) -> Baseline:
    """The base without its least influential FFN blocks; their attention stays."""
    ffns = persona_ffns(setting.model)
    size = _num_parameters(ffns[0])
    number = closest_number(setting.num_dropped, size, len(ffns))
    keep = torch.ones(len(ffns), down_weights(setting.model)[0].shape[1])
    keep[_least(block_influence(setting.model, setting.examples).ffns, number)] = 0.0
    return Baseline(masked(setting.model, keep), number * size)


def closest_number(wanted: int, size: int, most: int) -> int:
    """How many blocks of `size` come closest to `wanted` parameters, the smaller number where two are as close."""
    below = wanted // size
    return min(most, below + (wanted - below * size > (below + 1) * size - wanted))


def without_layers(model: torch.nn.Module, dropped: Sequence[int]) -> torch.nn.Module:
    """The model without some decoder layers; it shares all weights with the whole one."""
    kept = [layer for index, layer in enumerate(decoder_layers(model)) if index not in dropped]
    return with_children(model, model=with_children(model.get_submodule("model"), layers=torch.nn.ModuleList(kept)))


@torch.no_grad()
def block_influence(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> Influence:
    """Of every decoder layer and of every FFN block, over all tokens; the shared prompt counts once a batch."""
    similarities = _Similarities(len(decoder_layers(model)))
    num_tokens = 0
    with similarities.watching(model):
        for start in range(0, len(examples), batch):
            tree = plant_examples(examples[start : start + batch], model).tree
            run_tree(model, tree, TreeContext(tree))
            num_tokens += tree.token_ids.shape[1]
    return Influence(*(1 - similarities.sums / num_tokens))


class _Similarities:
    """Sums over tokens of the cosines of block inputs and outputs, `[2, layers]` fp64: decoder layers, FFN blocks."""

    def __init__(self, num_layers: int) -> None:
        self.sums = torch.zeros(2, num_layers, dtype=torch.float64)

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """See every pass through the model's layers."""
        with ExitStack() as hooks:
            for index, layer in enumerate(decoder_layers(model)):
                self._watch(index, layer, hooks)
            yield

    def _watch(self, index: int, layer: torch.nn.Module, hooks: ExitStack) -> None:
        entered: dict[int, torch.Tensor] = {}

        def enter(block: int, states: torch.Tensor) -> None:
            entered[block] = states

        def leave(output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            after = output if isinstance(output, torch.Tensor) else output[0]
            while entered:
                block, before = entered.popitem()
                self.sums[block, index] += F.cosine_similarity(before.double(), after.double(), dim=-1).sum().cpu()

        norm = layer.get_submodule("post_attention_layernorm")  # the residual stream enters the FFN block here
        handles = (
            layer.register_forward_pre_hook(lambda _module, inputs: enter(0, inputs[0])),
            norm.register_forward_pre_hook(lambda _module, inputs: enter(1, inputs[0])),
            layer.register_forward_hook(lambda _module, _inputs, output: leave(output)),
        )
        for handle in handles:
            hooks.callback(handle.remove)


def _least(influence: torch.Tensor, number: int) -> list[int]:
    return influence.argsort(stable=True)[:number].tolist()


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
