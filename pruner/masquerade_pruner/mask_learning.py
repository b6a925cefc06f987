"""Mask learning: the binary top-k of real scores, through a straight-through estimator on frozen weights.

Forward, each layer's `kept` highest scores z become a 0/1 mask on the FFN's intermediate activations; backward, the
mask is taken for the identity, so z receives the mask's gradient (Persona-Pruner, section 3; arXiv 2606.14695).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from masquerade_pruner.examples import Example
from masquerade_pruner.losses import chunked_cross_entropy, chunked_kl
from masquerade_pruner.tree import Tree, TreeContext, head_weight, plant, run_tree

Loss = Literal["kl", "cross_entropy"]


@dataclass(frozen=True, slots=True)
class Planted:
    """A step's examples as a tree, with the rows that are supervised."""

    tree: Tree
    rows: torch.Tensor  # [supervised]: positions in the packed row whose next token is an answer token
    targets: torch.Tensor  # [supervised]
    weights: torch.Tensor  # [supervised] fp32: each example counts the same, and so does each of its tokens; of a
    # whole step they sum to 1, of a micro-batch to its share
    owners: torch.Tensor  # [supervised]: index of the example
    num_examples: int


def plant_examples(examples: Sequence[Example], model: torch.nn.Module, *, of: int | None = None) -> Planted:
    """Pack examples of one persona around their shared prompt; they are some `of` a step's, by default all of it."""
    head = head_weight(model)
    device = head.device
    tree = plant([(*one.prompt, *one.answer) for one in examples], device, head.dtype)
    rows, targets, weights, owners = [], [], [], []
    last = tree.last.tolist()
    for index, one in enumerate(examples):
        end = last[index]  # the answer's last token predicts nothing that is supervised
        count = len(one.answer)
        rows.append(torch.arange(end - count, end))
        targets.append(torch.tensor(one.answer))
        weights.append(torch.full((count,), 1.0 / (count * (of or len(examples)))))
        owners.append(torch.full((count,), index))
    return Planted(
        tree,
        rows=torch.cat(rows).to(device),
        targets=torch.cat(targets).to(device),
        weights=torch.cat(weights).to(device),
        owners=torch.cat(owners).to(device),
        num_examples=len(examples),
    )


def plant_micro_batches(
    examples: Sequence[Example], model: torch.nn.Module, micro_batch: int | None
) -> Iterator[Planted]:
    """One step's examples in trees of at most `micro_batch` branches (None: one tree), each with the shared prompt.

    The losses of all, and so their gradients, add up to the whole step's.
    """
    size = micro_batch or len(examples)
    for start in range(0, len(examples), size):
        yield plant_examples(examples[start : start + size], model, of=len(examples))


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
        micro_batch: int | None = None,  # branches a pass; None: all of a step
        checkpointing: bool = False,
    ) -> None:
        # Beside the model, whatever device the scores come from.
        self.scores = initial_scores.detach().to(head_weight(model).device, torch.float32, copy=True).requires_grad_()
        self.step_number = 0
        self._model = model
        self._kept = kept
        self._loss = loss
        self._micro_batch = micro_batch
        self._checkpointing = checkpointing
        self._optimizer = torch.optim.Adam([self.scores], lr=learning_rate)
        self._learning_rate = learning_rate
        self._steps = steps

    def mask(self) -> torch.Tensor:
        """The current 0/1 mask, `[layers, intermediate]` fp32."""
        return top_k_mask(self.scores.detach(), self._kept)

    def step(self, examples: Sequence[Example]) -> float:
        """Learn from one batch; return its loss in nats a token."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for planted in plant_micro_batches(examples, self._model, self._micro_batch):
            loss = self._loss_of(planted)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * warm_cosine(self.step_number, self._steps)
        self._optimizer.step()
        self.step_number += 1
        return total

    def _loss_of(self, planted: Planted) -> torch.Tensor:
        """The share of the step's loss that the planted examples have."""
        mask = _StraightThrough.apply(self.scores, self._kept)  # type: ignore[no-untyped-call]
        context = TreeContext(planted.tree, mask)
        states = run_tree(self._model, planted.tree, context, checkpointing=self._checkpointing)[planted.rows]
        head = head_weight(self._model)
        if self._loss == "kl":
            return chunked_kl(states, dense_states(self._model, planted), head, planted.weights)
        return chunked_cross_entropy(states, head, planted.targets, planted.weights)

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
                **{key: state[key].to(self.scores.device, copy=True) for key in ("exp_avg", "exp_avg_sq")},
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
