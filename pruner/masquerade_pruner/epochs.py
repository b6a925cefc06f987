"""The order in which examples are learned from."""

from __future__ import annotations

import random
from collections.abc import Sequence

from masquerade_pruner.examples import Example


class Epochs:
    """Batches over shuffled epochs: every example is seen once before any is seen twice."""

    def __init__(self, examples: Sequence[Example], batch: int, seed: int | str) -> None:
        self._examples = examples
        self._batch = batch
        self._seed = seed

    def batch(self, step: int) -> list[Example]:
        """The examples of step number `step`, the same after a restart."""
        first = step * self._batch
        return [self._at(number) for number in range(first, first + self._batch)]

    def _at(self, number: int) -> Example:
        epoch, place = divmod(number, len(self._examples))
        return self._examples[self._order(epoch)[place]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._examples)))
        random.Random(f"epoch {epoch} {self._seed}").shuffle(order)
        return order
