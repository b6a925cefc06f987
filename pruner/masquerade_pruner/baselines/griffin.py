"""GRIFFIN (arXiv 2404.01365): a prompt's own activations say which neurons its continuation needs.

The statistic of neuron j is the norm over the prompt's tokens of its share of each token's activation vector,
s_j = || z_tj / ||z_t|| ||_t. Here the prompt is what all examples share, the persona prompt, so that the mask is the
persona's and not a question's, and it applies to every position as all masks here do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.examples import Example
from masquerade_pruner.importance import down_weights
from masquerade_pruner.tree import ActivationWatch, TreeContext, common_prefix, head_weight, plant, run_tree


def griffin(setting: Setting) -> Baseline:
    """The neurons with the largest statistic on the persona prompt alone."""
    return keep_best(setting, prompt_statistic(setting.model, persona_prompt(setting.examples)))


def persona_prompt(examples: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that all prompts start with. Raises `ValueError` where there are none."""
    shared = common_prefix([one.prompt for one in examples])
    if shared == 0:
        raise ValueError("the examples' prompts share no first token, so there is no persona prompt")
    return examples[0].prompt[:shared]


@torch.no_grad()
def prompt_statistic(model: torch.nn.Module, prompt: Sequence[int]) -> torch.Tensor:
    """s, `[layers, intermediate]` fp32."""
    down, head = down_weights(model), head_weight(model)
    watch = _Shares(len(down), down[0].shape[1])
    tree = plant([prompt], head.device, head.dtype)
    run_tree(model, tree, TreeContext(tree, watch=watch))
    return watch.squares.sqrt().float()


class _Shares(ActivationWatch):
    def see(self, layer: int, activations: torch.Tensor) -> None:
        super().see(layer, torch.nn.functional.normalize(activations.detach().float(), dim=-1))
