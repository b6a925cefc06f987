"""Attention of one ragged step over KV slots in plain torch, for any device.

Decoding rows attend in batches, each prompt chunk by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from masquerade_engine.decoder import AttentionShape, RotaryTable
from masquerade_engine.kv_cache import KVCache
from masquerade_kernels.rows import Norm, TorchRows

# What one more attention call costs, in keys read: 70 us against 0.055 us a key (bf16, 3 KV heads of 64, 2 threads).
_TILE_COST = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of a step that are one sequence's tokens."""

    slot: int
    row: int  # the first
    num_tokens: int
    start: int  # position of the first token

    @property
    def num_keys(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Tile:
    """Decoding rows that attend together: slots `lo` to `hi - 1` over their first `num_keys` positions."""

    lo: int
    hi: int
    num_keys: int
    spans: tuple[Span, ...]  # ascending slots, not necessarily all


def decode_tiles(spans: Sequence[Span], tile_cost: int = _TILE_COST) -> list[Tile]:
    """Cover single-token spans, ascending by slot, by rectangles of slots and keys.

    Neighbours join a rectangle where the padding that this reads costs less than another call.
    """
    tiles: list[Tile] = []
    for span in spans:
        last = tiles[-1] if tiles else None
        if last is not None:
            num_keys = max(last.num_keys, span.num_keys)
            joined = (span.slot + 1 - last.lo) * num_keys
            apart = (last.hi - last.lo) * last.num_keys + span.num_keys + tile_cost
            if joined <= apart:
                tiles[-1] = Tile(last.lo, span.slot + 1, num_keys, (*last.spans, span))
                continue
        tiles.append(Tile(span.slot, span.slot + 1, span.num_keys, (span,)))
    return tiles


@dataclass(slots=True)
class _PreparedTile:
    tile: Tile
    rows: torch.Tensor  # int64 [num_spans]
    gather: torch.Tensor | None  # int64 [hi - lo], row of each slot within the tile's; None: no holes
    scatter: torch.Tensor | None  # int64 [num_spans], slot of each row within the tile's
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)


class TorchAttention:
    """Spans of one token are decoding rows, wherever they stand; longer ones are prompt chunks."""

    def __init__(self, kv: KVCache, rotary: RotaryTable, spans: Sequence[Span], device: torch.device) -> None:
        self._kv = kv
        self._device = device
        decoding = sorted((span for span in spans if span.num_tokens == 1), key=lambda span: span.slot)
        self._tiles = [self._prepare(tile) for tile in decode_tiles(decoding)]
        self._chunks = [span for span in spans if span.num_tokens > 1]
        self._chunk_masks: dict[tuple[Span, int | None], torch.Tensor | None] = {}
        slots = [span.slot for span in spans for _ in range(span.num_tokens)]
        positions = [span.start + i for span in spans for i in range(span.num_tokens)]
        self._rows = kv.rows(slots, positions)
        at = torch.tensor(positions, device=device)
        self._cos, self._sin = rotary.cos[at], rotary.sin[at]  # [num_rows, head_dim / 2]

    def attend(self, layer: int, shape: AttentionShape, qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = _rotated_heads(qkv, shape, self._cos, self._sin)
        self._kv.write(layer, self._rows, key, value)
        grouped = query.view(shape.num_kv_heads, -1, *query.shape[1:])  # [kv_heads, group, num_rows, head_dim]
        attended = qkv.new_empty(len(qkv), shape.num_heads, shape.head_dim)
        for tile in self._tiles:
            query = grouped.index_select(2, tile.rows)
            attended[tile.rows] = self._decode(layer, tile, query, shape.scaling, shape.window)
        for span in self._chunks:
            rows = slice(span.row, span.row + span.num_tokens)
            chunk = self._prefill(layer, span, grouped[:, :, rows], shape.scaling, shape.window)
            attended[rows] = chunk.flatten(0, 1).transpose(0, 1)
        return attended.flatten(1)

    def _decode(
        self,
        layer: int,
        prepared: _PreparedTile,
        query: torch.Tensor,  # [kv_heads, group, num_spans, head_dim]
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`[num_spans, heads, head_dim]`: a group's query heads are one query sequence of their KV head."""
        tile = prepared.tile
        query = query.permute(2, 0, 1, 3)  # [num_spans, kv_heads, group, head_dim]
        if prepared.gather is not None:
            query = query.index_select(0, prepared.gather)
        attended = F.scaled_dot_product_attention(
            query,
            self._kv.keys[layer][tile.lo : tile.hi, :, : tile.num_keys],
            self._kv.values[layer][tile.lo : tile.hi, :, : tile.num_keys],
            attn_mask=self._decode_mask(prepared, window, query.dtype),
            scale=scaling,
        )
        attended = attended.flatten(1, 2)
        return attended if prepared.scatter is None else attended.index_select(0, prepared.scatter)

    def _prefill(
        self,
        layer: int,
        span: Span,
        query: torch.Tensor,  # [kv_heads, group, num_tokens, head_dim]
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`[kv_heads, group, num_tokens, head_dim]`; KV heads are the batch, and broadcast over their group."""
        group = query.shape[1]
        keys = self._kv.keys[layer][span.slot, :, None, : span.num_keys].expand(-1, group, -1, -1)
        values = self._kv.values[layer][span.slot, :, None, : span.num_keys].expand(-1, group, -1, -1)
        mask = self._chunk_mask(span, window, query.dtype)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling
        )

    def _prepare(self, tile: Tile) -> _PreparedTile:
        at = {span.slot: index for index, span in enumerate(tile.spans)}
        gather = scatter = None
        if len(at) < tile.hi - tile.lo:  # a hole computes some row again, and nobody reads it
            gather = torch.tensor([at.get(slot, 0) for slot in range(tile.lo, tile.hi)], device=self._device)
            scatter = torch.tensor([slot - tile.lo for slot in at], device=self._device)
        return _PreparedTile(
            tile, torch.tensor([span.row for span in tile.spans], device=self._device), gather, scatter
        )

    def _decode_mask(self, prepared: _PreparedTile, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive `[hi - lo, 1, 1, num_keys]`; a hole sees its first key."""
        if (window, dtype) not in prepared.masks:
            tile = prepared.tile
            lengths = [1] * (tile.hi - tile.lo)
            for span in tile.spans:
                lengths[span.slot - tile.lo] = span.num_keys
            length = torch.tensor(lengths, device=self._device)[:, None]
            position = torch.arange(tile.num_keys, device=self._device)
            hidden = position >= length
            if window is not None:
                hidden |= position < length - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device)
            prepared.masks[window, dtype] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return prepared.masks[window, dtype]

    def _chunk_mask(self, span: Span, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive `[num_tokens, num_keys]`; None where plain causal attention is meant."""
        if (span, window) not in self._chunk_masks:
            self._chunk_masks[span, window] = causal_mask(span, window, dtype, self._device)
        return self._chunk_masks[span, window]


class SlotAttention:
    """Decoding rows of the first slots: row i is a token of slot i, at position -1 where it is nobody's.

    Everything is computed from `positions` and of fixed shape, so that a captured step is right for other positions as
    well. Every row reads `num_keys` keys under a mask. A row that is nobody's writes where nobody reads, and sees the
    first key of its slot.
    """

    def __init__(self, kv: KVCache, rotary: RotaryTable, positions: torch.Tensor, num_keys: int) -> None:
        """`positions` is int64 `[num_rows]`, each below `num_keys`."""
        self._kv = kv
        self._rows = kv.rows_by_slot(positions)
        self._last = positions.clamp(min=0)
        self._cos, self._sin = (table.index_select(0, self._last) for table in (rotary.cos, rotary.sin))
        self._num_keys = num_keys
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def attend(self, layer: int, shape: AttentionShape, qkv: torch.Tensor) -> torch.Tensor:
        num_rows = len(qkv)
        query, key, value = _rotated_heads(qkv, shape, self._cos, self._sin)
        self._kv.write(layer, self._rows, key, value)
        grouped = query.view(shape.num_kv_heads, -1, *query.shape[1:])  # [kv_heads, group, num_rows, head_dim]
        attended = F.scaled_dot_product_attention(
            grouped.permute(2, 0, 1, 3),
            self._kv.keys[layer][:num_rows, :, : self._num_keys],
            self._kv.values[layer][:num_rows, :, : self._num_keys],
            attn_mask=self._mask(shape.window, qkv.dtype),
            scale=shape.scaling,
        )
        return attended.flatten(1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive `[num_rows, 1, 1, num_keys]`."""
        if (window, dtype) not in self._masks:
            key = torch.arange(self._num_keys, device=self._last.device)
            hidden = key > self._last[:, None]
            if window is not None:
                hidden |= key <= self._last[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[window, dtype] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._masks[window, dtype]


def causal_mask(span: Span, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Additive `[num_tokens, num_keys]` for a prompt chunk; None where plain causal attention is meant."""
    if span.start == 0 and (window is None or span.num_keys <= window):
        return None
    key = torch.arange(span.num_keys, device=device)
    query = torch.arange(span.start, span.num_keys, device=device)[:, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _rotated_heads(
    qkv: torch.Tensor, shape: AttentionShape, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, `[num_heads, num_rows, head_dim]` each; `cos` and `sin` `[num_rows, head_dim / 2]`."""
    heads = qkv.view(len(qkv), -1, shape.head_dim).transpose(0, 1)
    query, key, value = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
    query, key = _normed(query, shape.query_norm), _normed(key, shape.key_norm)
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In float32."""
    low, high = heads.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(heads.dtype)


def _normed(heads: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return heads if norm is None else TorchRows().norm(heads, norm)
