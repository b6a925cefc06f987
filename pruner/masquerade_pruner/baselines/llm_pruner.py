"""LLM-Pruner (arXiv 2305.11627), element-wise first order: |w · dL/dw| summed over a neuron's group.

A neuron's group is its row of gate, its row of up and its column of down. The loss is cross-entropy on the answers,
its gradient taken over all examples before the absolute value, as in the authors' `param_first` with group sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from masquerade_engine.seams import persona_ffns
from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.examples import Example
from masquerade_pruner.losses import chunked_cross_entropy
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import TreeContext, head_weight, run_tree


def llm_pruner(setting: Setting) -> Baseline:
    """The neurons whose weights matter most to the loss, to first order."""
    return keep_best(setting, taylor_importance(setting.model, setting.examples))


def taylor_importance(model: torch.nn.Module, examples: Sequence[Example], *, batch: int = 16) -> torch.Tensor:
    """`[layers, intermediate]` fp32. Holds the gradients of all FFN weights at once, in fp32."""
    groups = ("gate_proj", "up_proj", "down_proj")
    weights = [ffn.get_parameter(f"{name}.weight") for ffn in persona_ffns(model) for name in groups]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with _gradients_of(weights):
        for start in range(0, len(examples), batch):
            planted = plant_examples(examples[start : start + batch], model)
            states = run_tree(model, planted.tree, TreeContext(planted.tree))[planted.rows]
            loss = chunked_cross_entropy(states, head_weight(model), planted.targets, planted.weights)
            share = planted.num_examples / len(examples)
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient, alpha=share)
    salience = [(weight.detach() * total).abs() for weight, total in zip(weights, gradients, strict=True)]
    triples = zip(salience[0::3], salience[1::3], salience[2::3], strict=True)
    rows = [gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0) for gate, up, down in triples]
    return torch.stack(rows).cpu()


@contextmanager
def _gradients_of(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let gradients flow into a frozen model's `weights`, and freeze them again."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
