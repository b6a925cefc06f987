"""Which running sequence computes which prefix blocks, so that others wait for them and compute them no second time."""

from __future__ import annotations

from masquerade_engine.prefix_index import BLOCK
from masquerade_engine.sequence import Awaited, Sequence


class InFlight:
    """Claims of running sequences on the prefix blocks that they are about to compute.

    Blocks are known by a hash of all tokens up to their end: should two ever collide, somebody waits for nothing, and
    reads no KV that is not its own. A claim ends with its block's computation or with its sequence's run, so whoever
    waits, waits for a sequence that runs.
    """

    def __init__(self) -> None:
        self._claims: dict[int, Sequence] = {}

    def claim(self, sequence: Sequence, num_blocks: int) -> None:
        """A sequence starts to compute its tokens, of which the first `num_blocks` blocks will be cached."""
        first = sequence.num_computed // BLOCK
        for key in _keys(sequence, min(num_blocks, sequence.num_wanted // BLOCK))[first:]:
            self._claims.setdefault(key, sequence)

    def drop(self, sequence: Sequence) -> None:
        """A sequence has computed its blocks, or will not."""
        for key in sequence.block_keys:
            if self._claims.get(key) is sequence:
                del self._claims[key]

    def awaited_by(self, sequence: Sequence) -> Awaited | None:
        """Whom to wait for, and how far: the one that now computes the next blocks of this sequence."""
        if sequence.awaited is None or not sequence.awaited.is_coming:
            sequence.awaited = self._find(sequence) if self._claims else None
        return sequence.awaited

    def _find(self, sequence: Sequence) -> Awaited | None:
        keys = _keys(sequence, sequence.num_reusable // BLOCK)
        for index, key in enumerate(keys):
            claimant = self._claims.get(key)
            if claimant is not None and claimant.num_computed < (index + 1) * BLOCK:
                stop = index + 1
                while stop < len(keys) and self._claims.get(keys[stop]) is claimant:
                    stop += 1
                return Awaited(claimant, stop * BLOCK)
        return None


def _keys(sequence: Sequence, num_blocks: int) -> list[int]:
    """A hash of the namespace and all tokens up to the end of each of the first blocks."""
    keys = sequence.block_keys
    for index in range(len(keys), num_blocks):
        block = tuple(sequence.tokens[index * BLOCK : (index + 1) * BLOCK])
        keys.append(hash((keys[-1] if keys else sequence.namespace, block)))
    return keys[:num_blocks]
