"""Mask learning: the binary top-k of real scores, through a straight-through estimator on frozen weights.

Forward, each layer's `kept` highest scores z become a 0/1 mask on the FFN's intermediate activations; backward, the
mask is taken for the identity, so z receives the mask's gradient (Persona-Pruner, section 3; arXiv 2606.14695). From
a start that is good already, `MaskLearner` leaves out what kept neurons receive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from masquerade_pruner.examples import Continuation, Example
from masquerade_pruner.losses import chunked_cross_entropy, chunked_kl
from masquerade_pruner.tree import Tree, TreeContext, head_weight, plant, run_tree

Loss = Literal["kl", "cross_entropy"]

METHOD = "dropped-neurons/2"  # of learning: another one cannot go on from its checkpoints


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
    dense_states: torch.Tensor | None = None  # [supervised, hidden]: the dense base's, where they are known


def plant_examples(
    examples: Sequence[Continuation], model: torch.nn.Module, *, of: int | None = None, question_share: float = 0.0
) -> Planted:
    """Pack examples of one persona around their shared prompt; they are some `of` a step's, by default all of it.

    Of an example's weight its answer's tokens have 1 - `question_share`; the tokens of its own that come before (scene,
    earlier turns, question) share the rest, with the next token of the text as target.
    """
    head = head_weight(model)
    device = head.device
    # Each branch keeps its prompt's last token: that row predicts its answer's first.
    longest_prefix = min(len(one.prompt) for one in examples) - 1
    tree = plant([(*one.prompt, *one.answer) for one in examples], device, head.dtype, longest_prefix)
    rows, targets, weights, owners = [], [], [], []
    last = tree.last.tolist()
    for index, one in enumerate(examples):
        end = last[index]  # the answer's last token predicts nothing that is supervised
        count = len(one.answer)
        # The branch's tokens before the answer, but for its first, which the shared prefix predicts.
        before = max(0, len(one.prompt) - tree.num_prefix - 1) if question_share else 0
        share = question_share if before else 0.0
        rows.append(torch.arange(end - count - before, end))
        targets.append(torch.tensor([*one.prompt[len(one.prompt) - before :], *one.answer]))
        weights.append(torch.full((before,), share / (max(1, before) * (of or len(examples)))))
        weights.append(torch.full((count,), (1.0 - share) / (count * (of or len(examples)))))
        owners.append(torch.full((before + count,), index))
    return Planted(
        tree,
        rows=torch.cat(rows).to(device),
        targets=torch.cat(targets).to(device),
        weights=torch.cat(weights).to(device),
        owners=torch.cat(owners).to(device),
        num_examples=len(examples),
        dense_states=None if question_share else _known_states(examples, head),
    )


def _known_states(examples: Sequence[Continuation], head: torch.Tensor) -> torch.Tensor | None:
    """The dense base's states of all answers, `[supervised, hidden]`, where every example brings them."""
    known = [one.dense_states for one in examples if one.dense_states is not None]
    if len(known) < len(examples):
        return None
    assert [len(one) for one in known] == [len(one.answer) for one in examples], "a state before each answer token"
    return torch.cat(known).to(head)


def plant_micro_batches(
    examples: Sequence[Example], model: torch.nn.Module, micro_batch: int | None, *, question_share: float = 0.0
) -> Iterator[Planted]:
    """One step's examples in trees of at most `micro_batch` branches (None: one tree), each with the shared prompt.

    The losses of all, and so their gradients, add up to the whole step's.
    """
    size = micro_batch or len(examples)
    for start in range(0, len(examples), size):
        yield plant_examples(examples[start : start + size], model, of=len(examples), question_share=question_share)


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


def straight_through(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """`top_k_mask`, whose gradient reaches the scores as if it were they."""
    mask: torch.Tensor = _StraightThrough.apply(scores, kept)  # type: ignore[no-untyped-call]
    return mask


class DampedAdam(torch.optim.Optimizer):
    """Adam whose epsilon is the root mean square of all gradients: m / (√v + √mean(v)).

    Adam moves every score by about the learning rate, however little the loss depends on it, and most of a mask's
    border is such scores: one batch's noise shuffles them. Steps as large as gradients throw out neurons that matter.
    Here a score that matters less than most moves by the size of its gradient, and none by more than the learning rate
    (docs/findings.md has what that is worth).
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter against the average of its gradients."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                number = float(state["step"])
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                square = state["exp_avg_sq"] / (1 - second**number)
                scale = square.sqrt() + square.mean().sqrt().clamp(min=1e-30)
                parameter.sub_(state["exp_avg"] / scale, alpha=group["lr"] / (1 - first**number))


class MaskLearner:
    """Scores, their optimiser and one training step; state is saved and restored whole.

    With `dropped_alone`, dropped neurons compete for a place in the mask by their gradient and push out the kept ones
    of the lowest scores, which stand still. A dropped neuron's gradient says what a little of it would do, and so would
    all of it. A kept one's says what a little less would do, and losing it whole is another matter: many of those that
    a mask depends on most would be better at 0.9 and ruin it at 0. From a poor start there is more to gain than to
    spoil, and all neurons learn faster (docs/findings.md has the numbers of both).

    Scores are best given as ranks in [0, 1] in their layer: a learning rate then moves as many neurons over the border
    of the mask, whatever they come from. What comes out is an average of the scores over the steps.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        initial_scores: torch.Tensor,  # [layers, intermediate]
        kept: int,
        *,
        steps: int,
        learning_rate: float,
        loss: Loss = "kl",
        question_share: float = 0.0,
        dropped_alone: bool = False,  # whether only the neurons that a step dropped learn from it
        pull: torch.Tensor | None = None,  # [layers, intermediate], added to the scores where neurons are chosen
        micro_batch: int | None = None,  # branches a pass; None: all of a step
        checkpointing: bool = False,
    ) -> None:
        # Beside the model, whatever device the scores come from.
        self.scores = initial_scores.detach().to(head_weight(model).device, torch.float32, copy=True).requires_grad_()
        self.step_number = 0
        self._average = self.scores.detach().clone()
        self._model = model
        self._kept = kept
        self._loss = loss
        self._question_share = question_share
        self._dropped_alone = dropped_alone
        self._pull = torch.zeros_like(self.scores) if pull is None else pull.to(self.scores.device)
        self._micro_batch = micro_batch
        self._checkpointing = checkpointing
        self._optimizer = DampedAdam([self.scores], lr=learning_rate)
        self._learning_rate = learning_rate
        self._steps = steps

    def averaged(self) -> torch.Tensor:
        """The mean of the scores over the steps so far, each weighted by its number; `[layers, intermediate]` fp32.

        A step swings a few neurons with its batch, an average does not (arXiv 1212.2002 has the weights).
        """
        return self._average.clone()

    def mask(self) -> torch.Tensor:
        """The 0/1 mask of `averaged`, `[layers, intermediate]` fp32."""
        return top_k_mask(self.averaged() + self._pull, self._kept)

    def training_mask(self) -> torch.Tensor:
        """What a step masks with, `[layers, intermediate]`, differentiable in the scores."""
        return straight_through(self.scores + self._pull, self._kept)

    def heeded(self, gradient: torch.Tensor) -> torch.Tensor:
        """The part of a step's gradient that scores move against."""
        if not self._dropped_alone:
            return gradient
        return gradient.masked_fill(self.training_mask().detach() > 0, 0.0)

    def step(self, examples: Sequence[Example]) -> float:
        """Learn from one batch; return its loss in nats a token."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for planted in self._micro_batches(examples):
            loss = self._loss_of(planted)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        assert self.scores.grad is not None
        self.scores.grad = self.heeded(self.scores.grad)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * warm_cosine(self.step_number, self._steps)
        self._optimizer.step()
        self.step_number += 1
        self._average.lerp_(self.scores.detach(), 2 / (self.step_number + 1))
        return total

    def _micro_batches(self, examples: Sequence[Example]) -> Iterator[Planted]:
        return plant_micro_batches(examples, self._model, self._micro_batch, question_share=self._question_share)

    def _loss_of(self, planted: Planted) -> torch.Tensor:
        """The share of the step's loss that the planted examples have."""
        context = TreeContext(planted.tree, self.training_mask())
        states = run_tree(self._model, planted.tree, context, checkpointing=self._checkpointing)[planted.rows]
        return answer_loss(self._model, planted, states, self._loss)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed learner needs, as tensors."""
        adam = self._optimizer.state[self.scores]
        moments = {key: adam[key] for key in ("exp_avg", "exp_avg_sq")} if adam else {}
        return {
            "scores": self.scores.detach(),
            "average": self._average,
            "step": torch.tensor(self.step_number),
            **moments,
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        with torch.no_grad():
            self.scores.copy_(state["scores"])
        self._average.copy_(state["average"])
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


def reach(steps: int, learning_rate: float) -> float:
    """How far so many steps move a score that each of them moves by the whole learning rate the same way."""
    return sum(learning_rate * warm_cosine(step, steps) for step in range(steps))


@torch.no_grad()
def dense_states(model: torch.nn.Module, planted: Planted) -> torch.Tensor:
    """The dense base's final states at the supervised rows, `[supervised, hidden]`: those known, or computed now."""
    if planted.dense_states is not None:
        return planted.dense_states
    return run_tree(model, planted.tree, TreeContext(planted.tree))[planted.rows]


def answer_loss(model: torch.nn.Module, planted: Planted, states: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The loss in nats a token of a changed base's final states at the supervised rows, differentiable in them."""
    head = head_weight(model)
    if loss == "kl":
        return chunked_kl(states, dense_states(model, planted), head, planted.weights)
    return chunked_cross_entropy(states, head, planted.targets, planted.weights)
