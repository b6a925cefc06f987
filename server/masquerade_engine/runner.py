"""Runs batches: one ragged `[1, num_tokens]` pass through transformers' modelling code with our seams."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import nn

from masquerade_engine.attention import RaggedAttention, Span
from masquerade_engine.base import Base
from masquerade_engine.context import forward_context
from masquerade_engine.ffn_weights import CheckpointWeights, ModelWeights
from masquerade_engine.kv_cache import KVCache, KVGeometry
from masquerade_engine.pack_cache import PackCache
from masquerade_engine.sampler import sample
from masquerade_engine.seams import PersonaFFN, persona_ffns
from masquerade_engine.sequence import Batch, Chunk, SampledToken
from masquerade_kernels.coefficients import BASE_ROW, CoefficientTable
from masquerade_kernels.linear import PackedLinear
from masquerade_kernels.packs import dense_pack
from masquerade_kernels.persona_ffn import FFNSegment, run_persona_ffn
from masquerade_kernels.planner import Run, plan_step


class StepContext:
    """What one step tells the seams: where its rows' keys live, and which packs its rows run on."""

    def __init__(self, attention: RaggedAttention, segments: Rows[FFNSegment], table: CoefficientTable) -> None:
        self.attend = attention.attend
        self._segments = segments
        self._table = table

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        return run_persona_ffn(hidden[0], module.layer, self._segments, self._table).unsqueeze(0)


class Runner:
    """The base's packed weights, the KV cache and the personas' coefficients. Decides nothing."""

    def __init__(self, base: Base, *, num_slots: int, max_len: int, num_blocks: int, pack_cache_bytes: int) -> None:
        self._device = base.device
        self._stop_token_ids = base.stop_token_ids
        self._model = base.build_model()
        self._dense = dense_pack(ModelWeights(persona_ffns(self._model)))
        pack_linears(self._model)
        geometry = KVGeometry.of(base.config, base.dtype)
        self._kv = KVCache(geometry, num_slots, max_len, num_blocks, base.device)
        self._table = CoefficientTable(base.shape, num_slots, base.device)
        checkpoint = CheckpointWeights(base.path, base.shape.num_layers)
        self.packs = PackCache(checkpoint, pack_cache_bytes, base.dtype, base.device)

    def run(self, batch: Batch) -> list[SampledToken]:
        """Compute a batch: a token for each of `batch.sampling`, in that order."""
        for copy in batch.stores:
            self._kv.store(copy.slot, copy.start, copy.blocks)
        for copy in batch.loads:
            self._kv.load(copy.slot, copy.start, copy.blocks)
        sampling = batch.sampling
        logits = self.logits(batch)
        return sample(logits, sampling, self._stop_token_ids) if sampling else []

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """`[num_sampling, vocab]`, rows in the order of `batch.sampling`."""
        # 1. Lay the rows out: decoding rows by slot, then chunks; chunks of one pack side by side.
        chunks, segments = self._plan(sorted(batch.chunks, key=_layout_order))
        spans = _spans(chunks)
        # 2. Token ids and positions, [1, num_tokens].
        tokens = [t for chunk in chunks for t in chunk.sequence.tokens[chunk.start : chunk.stop]]
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.stop)]
        # 3. The pass; only rows that sample reach the vocabulary.
        attention = RaggedAttention(self._kv, spans, self._device)
        last_row = {
            id(chunk.sequence): span.row + span.num_tokens - 1 for chunk, span in zip(chunks, spans, strict=True)
        }
        rows = [last_row[id(sequence)] for sequence in batch.sampling]
        with forward_context(StepContext(attention, segments, self._table)):
            output: torch.Tensor = self._model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(rows, dtype=torch.int64, device=self._device),
            ).logits[0]
        return output

    def _plan(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[FFNSegment]]:
        """The chunks in the order of their rows, and the packs those rows run on."""
        resident = self.packs.resident()
        runs = [Run(_packable(chunk), chunk.num_tokens) for chunk in chunks]
        ordered: list[Chunk] = []
        segments: list[FFNSegment] = []
        row = 0
        for planned in plan_step(runs, resident):
            members = [chunks[index] for index in planned.runs]
            stop = row + sum(chunk.num_tokens for chunk in members)
            if planned.pack is None:
                segments.append(self._dense_segment(members, row, stop))
            else:
                segments.append(FFNSegment(row, stop, resident[planned.pack]))
            ordered += members
            row = stop
        return ordered, segments

    def _dense_segment(self, chunks: Rows[Chunk], start: int, stop: int) -> FFNSegment:
        functions = [chunk.sequence.request.function for chunk in chunks]
        subnetworks = [function.subnetwork for function in functions if function.subnetwork is not None]
        if not subnetworks:
            return FFNSegment(start, stop, self._dense)
        row_of = self._table.rows_of(subnetworks)
        rows = [
            BASE_ROW if chunk.sequence.request.function.subnetwork is None else row_of[_persona(chunk) or ""]
            for chunk in chunks
            for _ in range(chunk.num_tokens)
        ]
        return FFNSegment(start, stop, self._dense, torch.tensor(rows, device=self._device), frozenset(row_of))


def pack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` of the model by a `PackedLinear`, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))


def _persona(chunk: Chunk) -> str | None:
    subnetwork = chunk.sequence.request.function.subnetwork
    return None if subnetwork is None else subnetwork.digest


def _packable(chunk: Chunk) -> str | None:
    """The persona whose compact pack a chunk may run on; seeded requests stay on the dense one."""
    return None if chunk.sequence.sampling.seed is not None else _persona(chunk)


def _layout_order(chunk: Chunk) -> tuple[bool, int]:
    return chunk.num_tokens > 1, chunk.sequence.slot


def _spans(chunks: Rows[Chunk]) -> list[Span]:
    spans: list[Span] = []
    row = 0
    for chunk in chunks:
        spans.append(Span(chunk.sequence.slot, row, chunk.num_tokens, chunk.start))
        row += chunk.num_tokens
    return spans
