"""Likelihoods: how much a model thinks of whole answers, in nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from masquerade_pruner.examples import Continuation
from masquerade_pruner.losses import ROWS
from masquerade_pruner.mask_learning import Planted, plant_examples
from masquerade_pruner.tree import Forward, head_weight

BATCH = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that is scored behind a prompt."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    dense_states: ClassVar[None] = None  # nobody keeps them


@dataclass(frozen=True, slots=True)
class Scores:
    """Per continuation, in the order they were given."""

    log_likelihood: torch.Tensor  # [continuations] fp64: sum of log p over the answer's tokens, nats
    greedy: torch.Tensor  # [continuations] bool: every answer token is the likeliest one


@torch.no_grad()
def score(
    model: torch.nn.Module,
    continuations: Sequence[Continuation],
    forward: Forward,
    *,
    between: Callable[[], None] = lambda: None,
) -> Scores:
    """What `forward` gives each answer. Answers hold at least one token, and so do prompts.

    Continuations of one prompt are scored together, with its tokens computed once; `between` runs after each batch.
    """
    order = sorted(range(len(continuations)), key=lambda index: continuations[index].prompt)
    found = Scores(torch.zeros(len(order), dtype=torch.float64), torch.zeros(len(order), dtype=torch.bool))
    for start in range(0, len(order), BATCH):
        members = order[start : start + BATCH]
        planted = plant_examples([continuations[index] for index in members], model)
        batch = _score(forward(planted.tree)[planted.rows], head_weight(model), planted)
        places = torch.tensor(members)
        found.log_likelihood[places] = batch.log_likelihood
        found.greedy[places] = batch.greedy
        between()
    return found


def _score(states: torch.Tensor, head: torch.Tensor, planted: Planted) -> Scores:
    losses, missed = [], []
    for start in range(0, len(states), ROWS):
        targets = planted.targets[start : start + ROWS]
        logits = F.linear(states[start : start + ROWS], head).float()  # [rows, vocabulary]
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        missed.append(logits.argmax(-1) != targets)
    owners = planted.owners.cpu()
    totals = torch.zeros(planted.num_examples, dtype=torch.float64)
    totals.index_add_(0, owners, torch.cat(losses).double().cpu())
    misses = torch.zeros(planted.num_examples).index_add_(0, owners, torch.cat(missed).float().cpu())
    return Scores(-totals, misses == 0)
