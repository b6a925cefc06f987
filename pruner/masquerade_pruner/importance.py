"""Importance of FFN neurons without learning: where scores start, and the baselines of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from masquerade_engine.seams import persona_ffns
from masquerade_pruner.examples import Example
from masquerade_pruner.losses import chunked_cross_entropy
from masquerade_pruner.mask_learning import plant_examples, plant_micro_batches
from masquerade_pruner.tree import ActivationWatch, TreeContext, head_weight, run_tree


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """Each neuron of the dense base over the examples' tokens, `[layers, intermediate]` fp64."""

    mean: torch.Tensor
    variance: torch.Tensor


def baseline_scores(model: torch.nn.Module, statistics: Fluctuation) -> dict[str, torch.Tensor]:
    """What a learned mask is measured against in every report, by name, `[layers, intermediate]` each.

    On average they are the strongest of the methods without learning that give a mask alone (docs/findings.md).
    """
    return {"wanda": _weighted_magnitude(model, statistics), "flap": weighted_variance(model, statistics)}


def activation_importance(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> torch.Tensor:
    """Wanda-style importance of each FFN neuron, `[layers, intermediate]` fp32.

    The root mean square of its activation over the examples' tokens times the norm of its column of the down
    projection: Wanda's |W| * ||x|| (arXiv 2306.11695) over what dropping the neuron removes.
    """
    return _weighted_magnitude(model, fluctuation(model, examples, batch=batch))


def weighted_variance(model: torch.nn.Module, statistics: Fluctuation) -> torch.Tensor:
    """FLAP's WIFV, `[layers, intermediate]` fp64: the variance times the squared norm of the down projection's column.

    arXiv 2312.11983.
    """
    return statistics.variance * _column_norms(model).square()


@torch.no_grad()
def fluctuation(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> Fluctuation:
    """Mean and variance of every neuron's activation at all tokens; the shared prompt counts once a batch."""
    down = down_weights(model)
    watch = ActivationWatch(len(down), down[0].shape[1])
    for start in range(0, len(examples), batch):
        tree = plant_examples(examples[start : start + batch], model).tree
        run_tree(model, tree, TreeContext(tree, watch=watch))
    mean = watch.sums / watch.num_tokens
    return Fluctuation(mean, (watch.squares / watch.num_tokens - mean.square()).clamp_min(0))


def _weighted_magnitude(model: torch.nn.Module, statistics: Fluctuation) -> torch.Tensor:
    return ((statistics.variance + statistics.mean.square()).sqrt() * _column_norms(model)).float()


def _column_norms(model: torch.nn.Module) -> torch.Tensor:
    return torch.stack([weight.double().norm(dim=0).cpu() for weight in down_weights(model)])


def fisher_importance(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    batch: int = 4,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Fisher importance, `[layers, intermediate]`: the mean squared gradient of cross-entropy in each neuron's mask.

    Gradients are taken per group of `batch` branches at mask = 1 and squared; smaller groups are closer to the
    per-example definition and slower. `micro_batch` splits a group as `MaskLearner.step` splits a step.
    """
    down = down_weights(model)
    mask = torch.ones(len(down), down[0].shape[1], device=down[0].device, requires_grad=True)
    total = torch.zeros_like(mask)
    groups = range(0, len(examples), batch)
    for start in groups:
        for planted in plant_micro_batches(examples[start : start + batch], model, micro_batch):
            context = TreeContext(planted.tree, mask)
            states = run_tree(model, planted.tree, context, checkpointing=checkpointing)[planted.rows]
            torch.autograd.backward(chunked_cross_entropy(states, head_weight(model), planted.targets, planted.weights))
        assert mask.grad is not None
        total += mask.grad.square()
        mask.grad = None
        between()
    return (total / len(groups)).cpu()


def averaged_ranks(*importances: torch.Tensor) -> torch.Tensor:
    """Scores to start from: the mean over the importances (or scores) of each neuron's rank in its layer, in [0, 1]."""
    ranks = [importance.argsort(dim=1).argsort(dim=1).float() for importance in importances]
    return torch.stack(ranks).mean(0) / max(1, importances[0].shape[1] - 1)


def down_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The down projections by layer, each `[hidden, intermediate]`."""
    return [ffn.get_parameter("down_proj.weight") for ffn in persona_ffns(model)]
