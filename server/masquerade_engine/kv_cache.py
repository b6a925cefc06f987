"""Keys and values: one contiguous slot per running sequence, and the blocks of the prefix cache."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masquerade_engine.prefix_index import BLOCK

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

    A token's address within a layer is that of its first head's row; `write` takes the rows of all heads.
    """

    def __init__(
        self, geometry: KVGeometry, num_slots: int, max_len: int, num_blocks: int, device: torch.device
    ) -> None:
        g = geometry
        self._slots = lazy_zeros((g.num_layers, 2, num_slots, g.num_kv_heads, max_len, g.head_dim), g.dtype, device)
        self._blocks = lazy_zeros((g.num_layers, 2, num_blocks, g.num_kv_heads, BLOCK, g.head_dim), g.dtype, device)
        # [num_slots, kv_heads, max_len, head_dim] a layer
        self.keys = [layer[0] for layer in self._slots]
        self.values = [layer[1] for layer in self._slots]
        self._key_rows = [keys.view(-1, g.head_dim) for keys in self.keys]
        self._value_rows = [values.view(-1, g.head_dim) for values in self.values]
        self._heads = torch.arange(g.num_kv_heads, device=device)[:, None]
        self._num_kv_heads = g.num_kv_heads
        self._max_len = max_len
        self._device = device

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Where tokens' keys and values live: int64 `[kv_heads * num_tokens]`, heads first."""
        slot = torch.tensor(slots, device=self._device)
        position = torch.tensor(positions, device=self._device)
        return ((slot * self._num_kv_heads + self._heads) * self._max_len + position).flatten()

    def write(self, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put `key` and `value`, `[kv_heads, num_tokens, head_dim]`, at `rows`."""
        self._key_rows[layer].index_copy_(0, rows, key.flatten(0, 1))
        self._value_rows[layer].index_copy_(0, rows, value.flatten(0, 1))

    def store(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a slot's tokens from `start` on out to blocks."""
        self._blocks[:, :, torch.tensor(blocks, device=self._device)] = self._span(slot, start, len(blocks))

    def load(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy blocks in to a slot's tokens from `start` on."""
        cached = self._blocks.index_select(2, torch.tensor(blocks, device=self._device))
        self._span(slot, start, len(blocks)).copy_(cached)

    def _span(self, slot: int, start: int, num_blocks: int) -> torch.Tensor:
        """A view of a slot's tokens as blocks: `[num_layers, 2, num_blocks, kv_heads, BLOCK, head_dim]`."""
        tokens = self._slots[:, :, slot, :, start : start + num_blocks * BLOCK]
        num_layers, two, kv_heads, _, head_dim = tokens.shape
        return tokens.view(num_layers, two, kv_heads, num_blocks, BLOCK, head_dim).transpose(2, 3)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory on the CPU until a page of them is touched.

    Zeros and not garbage, because attention reads past a short sequence's end under its mask: NaN would not stay there.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if os.name == "nt":
        pages = mmap.mmap(-1, num_bytes)
    else:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would make 2 MB resident for a few tokens of a slot
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
