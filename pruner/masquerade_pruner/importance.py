"""Importance of FFN neurons without learning: where scores start, and the baselines of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from masquerade_engine.seams import persona_ffns
from masquerade_pruner.examples import Example
from masquerade_pruner.losses import chunked_cross_entropy
from masquerade_pruner.mask_learning import plant_examples, plant_micro_batches
from masquerade_pruner.tree import ActivationWatch, TreeContext, head_weight, run_tree


def activation_importance(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> torch.Tensor:
    """Wanda-style importance of each FFN neuron, `[layers, intermediate]`.

    The root mean square of its activation over the examples' tokens times the norm of its column of the down
    projection: Wanda's |W| * ||x|| (arXiv 2306.11695) over what dropping the neuron removes.
    """
    down = down_weights(model)
    watch = ActivationWatch(len(down), down[0].shape[1], down[0].device)
    observe(model, examples, watch, batch=batch)
    columns = torch.stack([weight.float().norm(dim=0) for weight in down])
    return ((watch.squares / max(1, watch.num_tokens)).sqrt() * columns).cpu()


@torch.no_grad()
def observe(model: torch.nn.Module, examples: Sequence[Example], watch: ActivationWatch, *, batch: int = 16) -> None:
    """Let `watch` see the dense base's activations at all tokens; the shared prompt counts once a batch."""
    for start in range(0, len(examples), batch):
        tree = plant_examples(examples[start : start + batch], model).tree
        run_tree(model, tree, TreeContext(tree, watch=watch))


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
