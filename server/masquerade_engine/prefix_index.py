"""Which token blocks of which function the prefix cache holds: bookkeeping only, no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16  # tokens; a shared prompt is reused up to its last whole block

Namespace = tuple[str, str]  # (digest, cast): KV is never shared across either
_Key = tuple[Namespace | int, tuple[int, ...]]  # (parent block, or namespace at the root; the block's tokens)


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Blocks to fill with the KV of tokens from `start` on."""

    start: int  # token position, a multiple of BLOCK
    blocks: tuple[int, ...]


class PrefixIndex:
    """A trie of token blocks under each namespace, with the least recently used leaf evicted first.

    Every use of a path marks its blocks from the leaf up to the root, so a parent is always younger than its
    children and the oldest block of all is a leaf.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_of: dict[_Key, int] = {}
        self._key_of: OrderedDict[int, _Key] = OrderedDict()  # oldest first

    def match(self, namespace: Namespace, tokens: Sequence[int]) -> tuple[int, ...]:
        """The blocks of the longest cached prefix, leaving at least one token to compute."""
        path = self._walk(namespace, tokens, (len(tokens) - 1) // BLOCK)
        self._touch(path)
        return tuple(path)

    def insert(self, namespace: Namespace, tokens: Sequence[int]) -> NewBlocks:
        """Make room for the whole blocks of `tokens` that are not cached; the caller fills them in order."""
        num_blocks = len(tokens) // BLOCK
        path = self._walk(namespace, tokens, num_blocks)
        self._touch(path)
        num_cached = len(path)
        while len(path) < num_blocks:
            block = self._take(path)
            if block is None:
                break
            key = _key(path[-1] if path else namespace, tokens, len(path))
            self._block_of[key] = block
            self._key_of[block] = key
            path.append(block)
        self._touch(path)
        return NewBlocks(num_cached * BLOCK, tuple(path[num_cached:]))

    def clear(self) -> None:
        """Forget every block."""
        self._free.extend(self._key_of)
        self._key_of.clear()
        self._block_of.clear()

    def __len__(self) -> int:
        return len(self._key_of)

    def _walk(self, namespace: Namespace, tokens: Sequence[int], limit: int) -> list[int]:
        path: list[int] = []
        while len(path) < limit:
            block = self._block_of.get(_key(path[-1] if path else namespace, tokens, len(path)))
            if block is None:
                break
            path.append(block)
        return path

    def _touch(self, path: Sequence[int]) -> None:
        for block in reversed(path):
            self._key_of.move_to_end(block)

    def _take(self, path: Sequence[int]) -> int | None:
        """A free block, else the oldest; None where only the path itself is left."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._key_of), None)
        if oldest is None or oldest in path:
            return None
        del self._block_of[self._key_of.pop(oldest)]
        return oldest


def _key(parent: Namespace | int, tokens: Sequence[int], index: int) -> _Key:
    return parent, tuple(tokens[index * BLOCK : (index + 1) * BLOCK])
