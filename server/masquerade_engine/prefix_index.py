"""Which token blocks of which function the prefix cache holds: bookkeeping only, no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from masquerade_masks import SettingError

# Tokens; a shared prompt is reused up to its last whole block. Median time to the first token of a warmed prompt of 155
# to 186 tokens and 30 more, SmolLM2, one thread, blocks of 16 and of 8 in turn: 66.5 and 64.2 ms, 62.6 and 58.9.
BLOCK = 8

Namespace = tuple[str, str]  # (digest, cast): KV is never shared across either
_Key = tuple[Namespace | int, tuple[int, ...]]  # (parent block, or namespace at the root; the block's tokens)


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Blocks to fill with the KV of tokens from `start` on."""

    start: int  # token position, a multiple of BLOCK
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    key: _Key
    namespace: Namespace


class PrefixIndex:
    """A trie of token blocks under each namespace, with the least recently used leaf evicted first.

    Every use of a path marks its blocks from the leaf up to the root, so a parent is always younger than its
    children and the oldest block of all is a leaf. Pinned blocks are in no such order; their parents are pinned too.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_of: dict[_Key, int] = {}
        self._unpinned: OrderedDict[int, _Entry] = OrderedDict()  # oldest first
        self._pinned: dict[int, _Entry] = {}  # parents before their children
        self._blocks_of: dict[str, set[int]] = {}  # by digest
        self._pins: dict[Namespace, list[tuple[int, ...]]] = {}  # what to pin, cached or not

    def match(self, namespace: Namespace, tokens: Sequence[int], limit: int | None = None) -> tuple[int, ...]:
        """The blocks of the longest cached prefix within `limit` tokens: all but the last, where none is given."""
        limit = len(tokens) - 1 if limit is None else limit
        path = self._walk(namespace, tokens, limit // BLOCK)
        self._touch(path)
        return tuple(path)

    def insert(self, namespace: Namespace, tokens: Sequence[int], spare: Collection[int] = ()) -> NewBlocks:
        """Make room for the whole blocks of `tokens` that are not cached; the caller fills them in order.

        Blocks in `spare` are not evicted for it.
        """
        num_blocks = len(tokens) // BLOCK
        path = self._walk(namespace, tokens, num_blocks)
        self._touch(path)
        num_cached = len(path)
        num_pinned = self._num_pinned_of(namespace, tokens) if num_cached < num_blocks else 0
        while len(path) < num_blocks:
            block = self._take(path, spare)
            if block is None:
                break
            key = _key(path[-1] if path else namespace, tokens, len(path))
            self._block_of[key] = block
            entries = self._pinned if len(path) < num_pinned else self._unpinned
            entries[block] = _Entry(key, namespace)
            self._blocks_of.setdefault(namespace[0], set()).add(block)
            path.append(block)
        self._touch(path)
        return NewBlocks(num_cached * BLOCK, tuple(path[num_cached:]))

    def pin(self, namespace: Namespace, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of `tokens` from eviction, those that are cached and those that will be.

        Raises `SettingError` where more than half of the cache would be pinned.
        """
        wanted = tuple(tokens[: len(tokens) // BLOCK * BLOCK])
        pins = self._pins.get(namespace, [])
        num_new = len(wanted) // BLOCK - self._num_pinned_of(namespace, wanted)
        num_pinned = sum(map(_num_distinct, self._pins.values()))
        if num_pinned + num_new > self.num_blocks // 2:
            raise SettingError(
                "pin",
                f"{num_new * BLOCK} more tokens cannot be pinned: {num_pinned * BLOCK} are, and at most half of the "
                f"prefix cache may be, {self.num_blocks // 2 * BLOCK} tokens",
            )
        if num_new:
            self._pins[namespace] = [*pins, wanted]
        for block in self._walk(namespace, wanted, len(wanted) // BLOCK):
            if block in self._unpinned:
                self._pinned[block] = self._unpinned.pop(block)

    def unpin(self, namespace: Namespace) -> None:
        """Let this namespace's blocks be evicted again, as the ones used last."""
        if self._pins.pop(namespace, None) is None:
            return
        for block in [block for block, entry in self._pinned.items() if entry.namespace == namespace][::-1]:
            self._unpinned[block] = self._pinned.pop(block)

    def forget(self, digest: str) -> None:
        """Drop all blocks of a function, in every cast, and its pins."""
        for namespace in [namespace for namespace in self._pins if namespace[0] == digest]:
            del self._pins[namespace]
        for block in list(self._blocks_of.get(digest, ())):
            self._evict(block)

    def clear(self) -> None:
        """Forget every block. What was to be pinned will be, once it is cached again."""
        self._free.extend((*self._unpinned, *self._pinned))
        self._unpinned.clear()
        self._pinned.clear()
        self._block_of.clear()
        self._blocks_of.clear()

    @property
    def num_pinned(self) -> int:
        """Cached blocks that are not evicted."""
        return len(self._pinned)

    @property
    def num_reusable(self) -> int:
        """The longest prefix that can be counted on to find room, in blocks."""
        return self.num_blocks - self.num_pinned

    def __len__(self) -> int:
        return len(self._block_of)

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
            if block in self._unpinned:
                self._unpinned.move_to_end(block)

    def _take(self, path: Collection[int], spare: Collection[int]) -> int | None:
        """A free block, else the oldest; None where that is of the path itself or to be spared."""
        if not self._free:
            oldest = next(iter(self._unpinned), None)
            if oldest is None or oldest in path or oldest in spare:
                return None
            self._evict(oldest)
        return self._free.pop()

    def _evict(self, block: int) -> None:
        entries = self._unpinned if block in self._unpinned else self._pinned
        entry = entries.pop(block)
        del self._block_of[entry.key]
        digest = entry.namespace[0]
        self._blocks_of[digest].discard(block)
        if not self._blocks_of[digest]:
            del self._blocks_of[digest]
        self._free.append(block)

    def _num_pinned_of(self, namespace: Namespace, tokens: Sequence[int]) -> int:
        """How many of these tokens' first blocks are to be pinned."""
        return max((_num_shared(pin, tokens) for pin in self._pins.get(namespace, ())), default=0)


def _key(parent: Namespace | int, tokens: Sequence[int], index: int) -> _Key:
    return parent, tuple(tokens[index * BLOCK : (index + 1) * BLOCK])


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Whole blocks that two token sequences begin with."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return (same.index(False) if False in same else len(same)) // BLOCK


def _num_distinct(pins: Sequence[tuple[int, ...]]) -> int:
    """Blocks that the pins of one namespace hold together."""
    shared = [max((_num_shared(pin, earlier) for earlier in pins[:i]), default=0) for i, pin in enumerate(pins)]
    return sum(len(pin) // BLOCK for pin in pins) - sum(shared)
