"""Attention of one ragged step over KV slots: decoding rows in batches, each prompt chunk by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from masquerade_engine.kv_cache import KVCache

# What one more attention call costs, in keys read: 70 us against 0.055 us a key (bf16, 3 KV heads of 64, 2 threads).
_TILE_COST = 1024
# Keys (rows x length) from which two batched products beat scaled_dot_product_attention for one query a row: 32 x 264
# took 0.48 ms against 0.92, 16 x 264 0.28 against 0.43, 4 x 264 0.10 against 0.08 (bf16, 9 heads on 3, 2 threads).
_MIN_BMM_KEYS = 3000


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
    row: int  # the first span's
    gather: torch.Tensor | None  # int64 [hi - lo], row of each slot within the tile's; None: no holes
    scatter: torch.Tensor | None  # int64 [num_spans], slot of each row within the tile's
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)


class RaggedAttention:
    """The attention of one step. Rows are decoding spans by ascending slot, then prompt chunks."""

    def __init__(self, kv: KVCache, spans: Sequence[Span], device: torch.device) -> None:
        self._kv = kv
        self._device = device
        decoding = [span for span in spans if span.num_tokens == 1]
        self._num_decoding = len(decoding)
        self._tiles = [self._prepare(tile) for tile in decode_tiles(decoding)]
        self._chunks = [span for span in spans if span.num_tokens > 1]
        self._chunk_masks: dict[tuple[Span, int | None], torch.Tensor | None] = {}
        slots = [span.slot for span in spans for _ in range(span.num_tokens)]
        positions = [span.start + i for span in spans for i in range(span.num_tokens)]
        self._rows = kv.rows(slots, positions)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [1, heads, num_rows, head_dim]
        key: torch.Tensor,  # [1, kv_heads, num_rows, head_dim]
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """`[1, num_rows, heads, head_dim]`; keys and values are written to their slots first."""
        self._kv.write(layer, self._rows, key[0], value[0])
        heads, num_rows, head_dim = query.shape[1:]
        grouped = query[0].view(key.shape[1], -1, num_rows, head_dim)  # [kv_heads, group, num_rows, head_dim]
        attended = query.new_empty(num_rows, heads, head_dim)
        for tile in self._tiles:
            rows = slice(tile.row, tile.row + len(tile.tile.spans))
            attended[rows] = self._decode(layer, tile, grouped[:, :, rows], scaling, sliding_window)
        for span in self._chunks:
            rows = slice(span.row, span.row + span.num_tokens)
            chunk = self._prefill(layer, span, grouped[:, :, rows], scaling, sliding_window)
            attended[rows] = chunk.flatten(0, 1).transpose(0, 1)
        return attended.unsqueeze(0)

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
        keys = self._kv.keys[layer][tile.lo : tile.hi]
        values = self._kv.values[layer][tile.lo : tile.hi]
        if query.device.type == "cpu" and (tile.hi - tile.lo) * tile.num_keys >= _MIN_BMM_KEYS:
            mask = self._decode_mask(prepared, window, torch.float32)
            attended = _batched_products(query, keys, values, mask, scaling)
        else:
            attended = F.scaled_dot_product_attention(
                query,
                keys[:, :, : tile.num_keys],
                values[:, :, : tile.num_keys],
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
        return _PreparedTile(tile, tile.spans[0].row, gather, scatter)

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
            self._chunk_masks[span, window] = self._made_chunk_mask(span, window, dtype)
        return self._chunk_masks[span, window]

    def _made_chunk_mask(self, span: Span, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        if span.start == 0 and (window is None or span.num_keys <= window):
            return None
        key = torch.arange(span.num_keys, device=self._device)
        query = torch.arange(span.start, span.num_keys, device=self._device)[:, None]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        return torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, -torch.inf)


def _batched_products(
    query: torch.Tensor,  # [num_slots, kv_heads, group, head_dim]
    keys: torch.Tensor,  # [num_slots, kv_heads, max_len, head_dim], contiguous
    values: torch.Tensor,
    mask: torch.Tensor,  # float32 [num_slots, 1, 1, num_keys]
    scaling: float,
) -> torch.Tensor:
    """Attention as keys x query and weights x values: the order of operands that oneDNN runs fastest.

    Twice as fast as `scaled_dot_product_attention` although `bmm` brings the strided tile into a buffer of its own. In
    bf16 scores are rounded before the softmax: KL to float32 0.00109 a token, 0.00105 without (64 tokens, SmolLM2).
    """
    num_slots, kv_heads, group, _ = query.shape
    num_keys = mask.shape[-1]
    flat_keys = keys.flatten(0, 1)[:, :num_keys]  # views: a slot's heads are neighbours in memory
    flat_values = values.flatten(0, 1)[:, :num_keys]
    scores = torch.bmm(flat_keys, query.flatten(0, 1).transpose(1, 2))  # [slots * kv_heads, num_keys, group]
    scores = scores.transpose(1, 2).contiguous().view(num_slots, kv_heads, group, num_keys)
    weights = torch.add(mask, scores, alpha=scaling).softmax(dim=-1).to(values.dtype)
    return torch.bmm(weights.flatten(0, 1), flat_values).view(query.shape)
