"""Held-out examples, with the dense base's side of every comparison computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from masquerade_pruner.examples import Continuation
from masquerade_pruner.losses import token_kl, token_nll
from masquerade_pruner.mask_learning import Planted, dense_states, plant_examples
from masquerade_pruner.tree import Forward, head_weight

BATCH = 16


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per example, in the order of the examples."""

    kl: torch.Tensor  # [examples]: mean over its answer's tokens of KL(dense ‖ changed), nats
    top1: torch.Tensor  # [examples]: share of its answer's tokens where both like the same token best


class HeldOut:
    """Examples that changes of the base are compared on; the dense states take `tokens x hidden` in its dtype."""

    def __init__(
        self,
        model: torch.nn.Module,
        examples: Sequence[Continuation],
        *,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._model = model
        self._between = between  # runs after each batch: a place to look for a cancellation
        # Batches of like length waste no attention on padding; results are put back in the examples' order.
        self._order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt))
        ordered = [examples[index] for index in self._order]
        self._batches = [plant_examples(ordered[at : at + BATCH], model) for at in range(0, len(ordered), BATCH)]
        self._dense = [self._dense_states(planted) for planted in self._batches]

    def divergence(self, changed: Forward) -> Divergence:
        """How far a change of the base is from the base itself on its own answers."""
        kls, top1s = [], []
        for planted, dense in zip(self._batches, self._dense, strict=True):
            kl, agree = token_kl(self._states(planted, changed), dense, self._head)
            kls.append(mean_by_owner(kl, planted))
            top1s.append(mean_by_owner(agree.float(), planted))
        return Divergence(self._in_order(kls), self._in_order(top1s))

    def nll(self, changed: Forward) -> torch.Tensor:
        """A change's mean -log p a token of each answer, whoever wrote it, `[examples]`, nats."""
        return self._nll(self._states(planted, changed) for planted in self._batches)

    def dense_nll(self) -> torch.Tensor:
        """The dense base's own, `[examples]`, nats."""
        return self._nll(self._dense)

    def _nll(self, states: Iterable[torch.Tensor]) -> torch.Tensor:
        rows = [
            mean_by_owner(token_nll(rows, self._head, planted.targets), planted)
            for planted, rows in zip(self._batches, states, strict=True)
        ]
        return self._in_order(rows)

    @property
    def _head(self) -> torch.Tensor:
        return head_weight(self._model)

    def _dense_states(self, planted: Planted) -> torch.Tensor:
        states = dense_states(self._model, planted)
        self._between()
        return states

    @torch.no_grad()
    def _states(self, planted: Planted, forward: Forward) -> torch.Tensor:
        states = forward(planted.tree)[planted.rows]
        self._between()
        return states

    def _in_order(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        values = torch.cat(list(batches))
        order = torch.tensor(self._order, device=values.device)
        return torch.empty_like(values).index_copy_(0, order, values)


def mean_by_owner(values: torch.Tensor, planted: Planted) -> torch.Tensor:
    """Mean of the supervised rows' values over each example's rows, `[examples]`."""
    owners = planted.owners.cpu()
    totals = torch.zeros(planted.num_examples).index_add_(0, owners, values.cpu())
    return totals / torch.bincount(owners, minlength=planted.num_examples)
