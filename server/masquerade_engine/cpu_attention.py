"""Attention of one step on the CPU: all decoding rows in one compiled loop, each prompt chunk by itself."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from masquerade_engine.attention import Span, causal_mask
from masquerade_engine.decoder import AttentionShape, RotaryTable
from masquerade_engine.kv_cache import KVCache
from masquerade_kernels.cpu_attention import AttentionLoops, attention_loops


class CPUAttention:
    """Spans of one token are decoding rows, wherever they stand; longer ones are prompt chunks."""

    def __init__(self, kv: KVCache, rotary: RotaryTable, spans: Sequence[Span]) -> None:
        self._kv = kv
        self._rotary = rotary
        self._num_threads = torch.get_num_threads()
        self._decoding = {span.row: span.num_keys for span in spans if span.num_tokens == 1}  # keys that each row sees
        self._chunks = [span for span in spans if span.num_tokens > 1]
        self._positions = torch.tensor([span.start + i for span in spans for i in range(span.num_tokens)])
        self._slots = torch.tensor([span.slot for span in spans for _ in range(span.num_tokens)])
        self._lengths = self._positions + 1
        self._plans: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by KV heads: the threads' parts
        self._masks: dict[tuple[Span, int | None], torch.Tensor | None] = {}

    def attend(self, layer: int, shape: AttentionShape, qkv: torch.Tensor) -> torch.Tensor:
        num_rows = qkv.shape[0]
        loops = loops_for(shape, qkv.dtype, self._num_threads)
        self._rotate_store(loops, layer, shape, qkv)
        attended = qkv.new_empty(num_rows, shape.num_heads * shape.head_dim)
        if self._decoding:
            self._decode(loops, layer, shape, qkv, attended)
        for span in self._chunks:
            rows = slice(span.row, span.row + span.num_tokens)
            attended[rows] = self._prefill(layer, shape, span, qkv[rows])
        return attended

    def _rotate_store(self, loops: AttentionLoops, layer: int, shape: AttentionShape, qkv: torch.Tensor) -> None:
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        query_norm, key_norm = shape.query_norm, shape.key_norm
        loops.rotate_store(
            qkv.shape[0],
            shape.num_heads,
            shape.num_kv_heads,
            qkv.data_ptr(),
            self._rotary.cos.data_ptr(),
            self._rotary.sin.data_ptr(),
            self._rotary.cos.shape[0],
            self._positions.data_ptr(),
            self._slots.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[0],
            keys.shape[2],
            0 if query_norm is None else query_norm.weight.data_ptr(),
            0 if key_norm is None else key_norm.weight.data_ptr(),
            0.0 if query_norm is None else query_norm.eps,
        )

    def _decode(
        self, loops: AttentionLoops, layer: int, shape: AttentionShape, qkv: torch.Tensor, out: torch.Tensor
    ) -> None:
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        order, bounds = self._parts(shape.num_kv_heads)
        loops.attend(
            sum(self._decoding.values()) * shape.num_kv_heads,
            qkv.shape[0],
            shape.num_heads,
            shape.num_kv_heads,
            qkv.data_ptr(),
            self._slots.data_ptr(),
            self._lengths.data_ptr(),
            max(self._decoding.values()),
            order.data_ptr(),
            bounds.data_ptr(),
            self._num_threads,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[0],
            keys.shape[2],
            shape.window or 0,
            shape.scaling,
            out.data_ptr(),
        )

    def _prefill(self, layer: int, shape: AttentionShape, span: Span, qkv: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, heads * head_dim]`; KV heads are the batch, and broadcast over their group."""
        group = shape.num_heads // shape.num_kv_heads
        query = qkv[:, : shape.num_heads * shape.head_dim]
        query = query.view(span.num_tokens, shape.num_kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
        keys = self._kv.keys[layer][span.slot, :, None, : span.num_keys].expand(-1, group, -1, -1)
        values = self._kv.values[layer][span.slot, :, None, : span.num_keys].expand(-1, group, -1, -1)
        if (span, shape.window) not in self._masks:
            self._masks[span, shape.window] = causal_mask(span, shape.window, qkv.dtype, qkv.device)
        mask = self._masks[span, shape.window]
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=shape.scaling
        )
        return attended.permute(2, 0, 1, 3).flatten(1)

    def _parts(self, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        if num_kv_heads not in self._plans:
            order, bounds = balanced_parts(self._decoding, num_kv_heads, self._num_threads)
            self._plans[num_kv_heads] = torch.tensor(order), torch.tensor(bounds)
        return self._plans[num_kv_heads]


def loops_for(shape: AttentionShape, dtype: torch.dtype, num_threads: int) -> AttentionLoops:
    """The compiled loops of a layer; the first call for a geometry takes seconds on a machine that never did it."""
    return attention_loops(8 * dtype.itemsize, shape.head_dim, shape.num_heads // shape.num_kv_heads, num_threads)


def balanced_parts(lengths: Mapping[int, int], num_kv_heads: int, num_threads: int) -> tuple[list[int], list[int]]:
    """Tasks (row * num_kv_heads + head) in the order of the threads that take them, and each thread's bounds.

    `lengths` are the keys by row. Longest first to the thread with the least to read: none reads more than a task
    beyond its share.
    """
    parts: list[list[int]] = [[] for _ in range(num_threads)]
    loads = [(0, thread) for thread in range(num_threads)]
    for row in sorted(lengths, key=lambda row: -lengths[row]):
        for head in range(num_kv_heads):
            load, thread = heapq.heappop(loads)
            parts[thread].append(row * num_kv_heads + head)
            heapq.heappush(loads, (load + lengths[row], thread))
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + len(part))
    return [task for part in parts for task in part], bounds
