"""Keys and values: one contiguous slot per running sequence, and the blocks of the prefix cache."""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

from masquerade_engine.prefix_index import BLOCK
from masquerade_masks import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """What one token's keys and values take."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> KVGeometry:
        """The geometry of a supported family's config."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=dtype,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """`[num_layers, 2, num_slots, kv_heads, max_len, head_dim]`, and the same in blocks of `BLOCK` tokens.

    A token's address within a layer is that of its first head's row; `write` takes the rows of all heads. Behind the
    last slot lies one token more, which nobody reads: what a step computes for rows that are nobody's goes there.
    """

    def __init__(
        self, geometry: KVGeometry, num_slots: int, max_len: int, num_blocks: int, device: torch.device
    ) -> None:
        g = geometry
        num_rows = num_slots * g.num_kv_heads * max_len  # of a layer's keys, and of its values
        self._memory = LazyZeros((g.num_layers, 2, num_rows + g.num_kv_heads, g.head_dim), g.dtype, device)
        rows = self._memory.tensor
        self._slots = rows[:, :, :num_rows].view(g.num_layers, 2, num_slots, g.num_kv_heads, max_len, g.head_dim)
        blocks = LazyZeros((g.num_layers, 2, num_blocks, g.num_kv_heads, BLOCK, g.head_dim), g.dtype, device)
        self._blocks = blocks.tensor
        # [num_slots, kv_heads, max_len, head_dim] a layer
        self.keys = [layer[0] for layer in self._slots]
        self.values = [layer[1] for layer in self._slots]
        self._key_rows = [layer[0] for layer in rows]
        self._value_rows = [layer[1] for layer in rows]
        self._heads = torch.arange(g.num_kv_heads, device=device)[:, None]
        self._num_kv_heads = g.num_kv_heads
        self._max_len = max_len
        self._device = device

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Where tokens' keys and values live: int64 `[kv_heads * num_tokens]`, heads first."""
        slot = torch.tensor(slots, device=self._device)
        position = torch.tensor(positions, device=self._device)
        return self._at(slot, position).flatten()

    def rows_by_slot(self, positions: torch.Tensor) -> torch.Tensor:
        """As `rows`, of a token in each of the first slots, int64 `[num_tokens]`; at -1: where nobody reads."""
        slot = torch.arange(len(positions), device=self._device)
        nowhere = self._slots[0, 0].numel() // self._slots.shape[-1] + self._heads
        return torch.where(positions < 0, nowhere, self._at(slot, positions)).flatten()

    def _at(self, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Int64 `[kv_heads, num_tokens]`."""
        return (slot * self._num_kv_heads + self._heads) * self._max_len + position

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put `key` and `value`, `[kv_heads, num_tokens, head_dim]`, at `rows`."""
        self._key_rows[layer].index_copy_(0, rows, key.flatten(0, 1))
        self._value_rows[layer].index_copy_(0, rows, value.flatten(0, 1))

    def store(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a slot's tokens from `start` on out to blocks."""
        for index, first, num_blocks in _runs(blocks):
            tokens = self._span(slot, start + index * BLOCK, num_blocks)
            self._blocks[:, :, first : first + num_blocks].copy_(tokens)

    def load(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy blocks in to a slot's tokens from `start` on."""
        for index, first, num_blocks in _runs(blocks):
            tokens = self._span(slot, start + index * BLOCK, num_blocks)
            tokens.copy_(self._blocks[:, :, first : first + num_blocks])

    def trim(self, slot: int, start: int, stop: int) -> None:
        """Give the memory of a slot's tokens from `start` up to `stop` back; what they held reads as anything."""
        num_layers, two, _, heads, _, _ = self._slots.shape
        strides = [stride * self._slots.itemsize for stride in self._slots.stride()]  # bytes
        for layer, side, head in product(range(num_layers), range(two), range(heads)):
            first = layer * strides[0] + side * strides[1] + slot * strides[2] + head * strides[3]
            self._memory.give_back(first + start * strides[4], first + stop * strides[4])

    def _span(self, slot: int, start: int, num_blocks: int) -> torch.Tensor:
        """A view of a slot's tokens as blocks: `[num_layers, 2, num_blocks, kv_heads, BLOCK, head_dim]`."""
        tokens = self._slots[:, :, slot, :, start : start + num_blocks * BLOCK]
        num_layers, two, kv_heads, _, head_dim = tokens.shape
        return tokens.view(num_layers, two, kv_heads, num_blocks, BLOCK, head_dim).transpose(2, 3)


def _runs(blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Index, first block and length of each run of blocks that lie side by side.

    One copy a run took half of what one gather took: 0.5 ms against 1.0 for 160 tokens of SmolLM2 in bf16.
    """
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1] + 1]
    return [(i, blocks[i], stop - i) for i, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def slots_are_lazy(device: torch.device) -> bool:
    """Whether slots take memory only for the tokens in them."""
    return device.type == "cpu" and os.name != "nt"


class LazyZeros:
    """Zeros that take no memory on the CPU until a page of them is touched.

    Zeros and not garbage, because attention reads past a short sequence's end under its mask: NaN would not stay there.
    Raises `SettingError` where the system refuses the address space.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._pages: mmap.mmap | None = None
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0 or not slots_are_lazy(device):
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
            return
        self._pages = _reserve(num_bytes)
        self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)

    def give_back(self, start: int, stop: int) -> None:
        """The whole pages within bytes `start` to `stop - 1` are not resident until they are touched again."""
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if num_bytes > 0 and self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED, start, num_bytes)


def _reserve(num_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        flags |= 0x4000  # MAP_NORESERVE, which Python names from 3.13 on: more than the machine's memory may be mapped
    try:
        pages = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise SettingError(
            "max_model_len",
            f"the system refuses {num_bytes} bytes of address space for keys and values; lower it or max_num_seqs",
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would make 2 MB resident for a few tokens of a slot
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
