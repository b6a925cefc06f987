"""Sequences that wait for a slot: first come, first served within a cast, and the casts in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from masquerade_engine.sequence import Sequence


class WaitingQueue:
    """The sequences of one level, in the order in which they are to be admitted.

    The cast at the front gives its first sequence and goes to the back. A sequence that is passed over keeps its
    place, and so does its cast.
    """

    def __init__(self) -> None:
        self._casts: OrderedDict[str, OrderedDict[str, Sequence]] = OrderedDict()  # next first; none is empty
        self._num_sequences = 0

    def append(self, sequence: Sequence) -> None:
        """Behind all others of its cast."""
        self._queue_of(sequence)[sequence.request.id] = sequence
        self._num_sequences += 1

    def put_back(self, sequence: Sequence) -> None:
        """To the very front: it had its turn and lost its slot."""
        self.append(sequence)
        self._queue_of(sequence).move_to_end(sequence.request.id, last=False)
        self._casts.move_to_end(sequence.request.function.cast, last=False)

    def first(self, may_go: Callable[[Sequence], bool]) -> Sequence | None:
        """The next of those that may go; it stays until it is taken."""
        return next(filter(may_go, self), None)

    def take(self, sequence: Sequence) -> None:
        """It is admitted: its cast's next turn comes after all others'."""
        self.remove(sequence)
        if sequence.request.function.cast in self._casts:
            self._casts.move_to_end(sequence.request.function.cast)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more."""
        cast = sequence.request.function.cast
        del self._casts[cast][sequence.request.id]
        if not self._casts[cast]:
            del self._casts[cast]
        self._num_sequences -= 1

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._casts.values() for sequence in queue.values())

    def _queue_of(self, sequence: Sequence) -> OrderedDict[str, Sequence]:
        return self._casts.setdefault(sequence.request.function.cast, OrderedDict())
