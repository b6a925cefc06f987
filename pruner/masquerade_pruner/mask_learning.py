"""Mask learning: the binary top-k of real scores, through a straight-through estimator on frozen weights.

Forward, each layer's `kept` highest scores z become a 0/1 mask on the FFN's intermediate activations; backward, the
mask is taken for the identity, so z receives the mask's gradient (Persona-Pruner, section 3; arXiv 2606.14695).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from masquerade_pruner.examples import Continuation, Example
from masquerade_pruner.losses import chunked_cross_entropy, chunked_kl
from masquerade_pruner.tree import Tree, TreeContext, head_weight, plant, run_tree

Loss = Literal["kl", "cross_entropy"]


@dataclass(frozen=True, slots=True)
class Planted:
    """A step's examples as a tree, with the rows that are supervised."""

    tree: Tree
    rows: torch.Tensor  # [supervised]: positions in the packed row whose next token is an answer token
    targets: torch.Tensor  # [supervised]
    weights: torch.Tensor  # [supervised] fp32: each example counts the same, and so does each of its tokens
    owners: torch.Tensor  # [supervised]: index of the example
    num_examples: int


def plant_examples(examples: Sequence[Continuation], model: torch.nn.Module) -> Planted:
    """Pack examples of one persona around their shared prompt."""
    head = head_weight(model)
    device = head.device
    # Each branch keeps its prompt's last token: that row predicts its answer's first.
    longest_prefix = min(len(one.prompt) for one in examples) - 1
    tree = plant([(*one.prompt, *one.answer) for one in examples], device, head.dtype, longest_prefix)
    rows, targets, weights, owners = [], [], [], []
    for index, one in enumerate(examples):
        end = int(tree.last[index])  # the answer's last token predicts nothing that is supervised
        count = len(one.answer)
        rows.append(torch.arange(end - count, end))
        targets.append(torch.tensor(one.answer))
        weights.append(torch.full((count,), 1.0 / (count * len(examples))))
        owners.append(torch.full((count,), index))
    return Planted(
        tree,
        rows=torch.cat(rows).to(device),
        targets=torch.cat(targets).to(device),
        weights=torch.cat(weights).to(device),
        owners=torch.cat(owners).to(device),
        num_examples=len(examples),
    )


def top_k_mask(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The 0/1 mask, `[layers, intermediate]` in the scores' dtype, of each layer's `kept` highest scores."""
    indices = scores.topk(kept, dim=1).indices
    return torch.zeros_like(scores).scatter_(1, indices, 1.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, kept):  # type: ignore[no-untyped-def]
        return top_k_mask(scores, kept)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


class MaskLearner:
    """Scores, their optimiser and one training step; state is saved and restored whole."""

    def __init__(
        self,
        model: torch.nn.Module,
        initial_scores: torch.Tensor,  # [layers, intermediate]
        kept: int,
        *,
        steps: int,
        learning_rate: float,
        loss: Loss = "kl",
    ) -> None:
        self.scores = initial_scores.detach().clone().float().requires_grad_()
        self.step_number = 0
        self._model = model
        self._kept = kept
        self._loss = loss
        self._optimizer = torch.optim.Adam([self.scores], lr=learning_rate)
        self._learning_rate = learning_rate
        self._steps = steps

    def mask(self) -> torch.Tensor:
        """The current 0/1 mask, `[layers, intermediate]` fp32."""
        return top_k_mask(self.scores.detach(), self._kept)

    def step(self, examples: Sequence[Example]) -> float:
        """Learn from one batch; return its loss in nats a token."""
        planted = plant_examples(examples, self._model)
        mask = _StraightThrough.apply(self.scores, self._kept)  # type: ignore[no-untyped-call]
        states = run_tree(self._model, planted.tree, TreeContext(planted.tree, mask))[planted.rows]
        head = head_weight(self._model)
        if self._loss == "kl":
            loss = chunked_kl(states, dense_states(self._model, planted), head, planted.weights)
        else:
            loss = chunked_cross_entropy(states, head, planted.targets, planted.weights)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * warm_cosine(self.step_number, self._steps)
        self._optimizer.step()
        self.step_number += 1
        return float(loss.detach())

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed learner needs, as tensors."""
        adam = self._optimizer.state[self.scores]
        moments = {key: adam[key] for key in ("exp_avg", "exp_avg_sq")} if adam else {}
        return {"scores": self.scores.detach(), "step": torch.tensor(self.step_number), **moments}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        with torch.no_grad():
            self.scores.copy_(state["scores"])
        self.step_number = int(state["step"])
        if "exp_avg" in state:
            self._optimizer.state[self.scores] = {
                "step": torch.tensor(float(self.step_number)),
                "exp_avg": state["exp_avg"].clone(),
                "exp_avg_sq": state["exp_avg_sq"].clone(),
            }


def warm_cosine(step: int, steps: int) -> float:
    """The learning rate's factor at a step: a short linear warm-up, then a cosine down to 2 %."""
    warmup = max(1, min(5, steps // 10))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def dense_states(model: torch.nn.Module, planted: Planted) -> torch.Tensor:
    """The dense base's final states at the supervised rows, `[supervised, hidden]`."""
    return run_tree(model, planted.tree, TreeContext(planted.tree))[planted.rows]
