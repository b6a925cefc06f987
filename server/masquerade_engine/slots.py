"""The KV slots: which are free, and how much memory those that were left still hold."""

from __future__ import annotations

import heapq

from masquerade_engine.sequence import Trim


class Slots:
    """Slots by number, the lowest free one first: that keeps the decode's KV range short.

    A slot keeps the memory of its first `num_kept` tokens for whoever comes next.
    """

    def __init__(self, num_slots: int, num_kept: int) -> None:
        self._num_kept = num_kept
        self._free = list(range(num_slots))  # a heap
        self._num_touched = [0] * num_slots  # tokens whose memory may be resident
        self._left: set[int] = set()  # since the last `trims`

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free slot."""
        return heapq.heappop(self._free)

    def leave(self, slot: int, num_tokens: int) -> None:
        """A slot is free, in which the KV of so many tokens was written."""
        heapq.heappush(self._free, slot)
        self._num_touched[slot] = max(self._num_touched[slot], num_tokens)
        self._left.add(slot)

    def trims(self) -> tuple[Trim, ...]:
        """The memory that long contexts have left behind, whoever has taken their slots over."""
        long = [slot for slot in self._left if self._num_touched[slot] > self._num_kept]
        trims = tuple(Trim(slot, self._num_kept, self._num_touched[slot]) for slot in long)
        for slot in long:
            self._num_touched[slot] = self._num_kept
        self._left.clear()
        return trims
