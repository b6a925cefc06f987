"""Runs batches: one ragged pass over the rows of many sequences. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch

from masquerade_engine.attention import Span, TorchAttention
from masquerade_engine.base import Base
from masquerade_engine.cpu_attention import CPUAttention, loops_for
from masquerade_engine.decode_graphs import DecodeGraphs, DecodeRow, graph_capture
from masquerade_engine.decoder import Decoder, StepAttention
from masquerade_engine.ffn_weights import CheckpointWeights, ModelWeights
from masquerade_engine.kv_cache import KVCache, KVGeometry
from masquerade_engine.pack_cache import PackCache, Resident
from masquerade_engine.sampler import Sampler
from masquerade_engine.seams import persona_ffns
from masquerade_engine.sequence import Batch, Chunk, SampledToken, Sequence
from masquerade_kernels.coefficients import BASE_ROW, CoefficientTable
from masquerade_kernels.gathered import GatheredWeights, can_gather
from masquerade_kernels.lora import lora_rows
from masquerade_kernels.packs import PackFormat, dense_pack, gathered_dense_pack
from masquerade_kernels.persona_ffn import FFNSegment, run_persona_ffn
from masquerade_kernels.planner import Run, plan_step
from masquerade_kernels.row_costs import measure_row_costs
from masquerade_kernels.rows import row_ops


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the chunks of a step run, for as long as the same personas do so in the same order."""

    runs: tuple[Run, ...]
    resident: Resident
    order: tuple[int, ...]  # of the chunks, by row
    segments: tuple[FFNSegment, ...]
    personas: tuple[int, ...] | None = None  # each row's row of the coefficients, where a graph may replay the step


class Runner:
    """The base's packed weights, the KV cache and the personas' coefficients."""

    def __init__(
        self,
        base: Base,
        *,
        num_slots: int,
        max_len: int,
        num_blocks: int,
        pack_cache_bytes: int,
        int8: bool = False,
        enforce_eager: bool = False,
    ) -> None:
        self._device = base.device
        self._sampler = Sampler(base.stop_token_ids)
        self._rows = row_ops(base.device, base.dtype)
        model = base.build_model()
        weights, gathered = ModelWeights(persona_ffns(model)), None
        if can_gather(base.device) and not int8:
            gathered = GatheredWeights.of(weights, dtype=base.dtype, device=base.device)
        form = PackFormat(base.dtype, base.device, int8, gathered)
        self._dense = dense_pack(weights, form) if gathered is None else gathered_dense_pack(gathered)
        self._decoder = Decoder(model, self._rows, max_len, int8=int8)
        geometry = KVGeometry.of(base.config, base.dtype)
        self._kv = KVCache(geometry, num_slots, max_len, num_blocks, base.device)
        capture = None if enforce_eager else graph_capture(base.device)
        self._table = CoefficientTable(base.shape, num_slots, base.device, base.dtype, whole=capture is not None)
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            self._graphs = DecodeGraphs(
                self._decoder,
                self._kv,
                self._rows,
                capture,
                num_slots=num_slots,
                max_len=max_len,
                hidden_size=base.shape.hidden_size,
                dtype=base.dtype,
                device=base.device,
            )
        if base.device.type == "cpu":
            for shape in self._decoder.attentions:
                loops_for(shape, base.dtype, torch.get_num_threads())
        self._costs = measure_row_costs(
            self._dense, base.shape.hidden_size, base.dtype, base.device, self._rows, gathered
        )
        self._plan = _Plan((), Resident(), (), ())
        self.packs = PackCache(CheckpointWeights(base.path, base.shape.num_layers), pack_cache_bytes, form)

    def run(self, batch: Batch) -> list[SampledToken]:
        """Compute a batch: a token for each of `batch.sampling`, in that order."""
        for copy in batch.stores:
            self._kv.store(copy.slot, copy.start, copy.blocks)
        for trim in batch.trims:
            self._kv.trim(trim.slot, trim.start, trim.stop)
        for copy in batch.loads:
            self._kv.load(copy.slot, copy.start, copy.blocks)
        sampling = batch.sampling
        states = self.final_states(batch)
        if not sampling:
            return []
        return _with_states(self._sampler.sample(self._decoder.logits(states), sampling), sampling, states)

    def logits(self, batch: Batch) -> torch.Tensor:
        """`[num_sampling, vocab]`, rows in the order of `batch.sampling`."""
        return self._decoder.logits(self.final_states(batch))

    @torch.inference_mode()
    def final_states(self, batch: Batch) -> torch.Tensor:
        """What the head reads of the rows that sample, `[num_sampling, hidden]`, in the order of `batch.sampling`."""
        # 1. Lay the rows out: decoding rows by slot, then chunks, as far as their packs allow.
        chunks, segments = self._planned(sorted(batch.chunks, key=_layout_order))
        by_slot = self._replayed(chunks)
        if by_slot is not None:
            slots = [sequence.slot for sequence in batch.sampling]
            return by_slot.index_select(0, torch.tensor(slots, dtype=torch.int64, device=self._device))
        spans = _spans(chunks)
        tokens = [t for chunk in chunks for t in chunk.sequence.tokens[chunk.start : chunk.stop]]
        # 2. The rows that sample; only they reach the vocabulary.
        last_row = {
            id(chunk.sequence): span.row + span.num_tokens - 1 for chunk, span in zip(chunks, spans, strict=True)
        }
        keep = [last_row[id(sequence)] for sequence in batch.sampling]
        # 3. The pass.
        hidden = self._decoder.hidden(
            torch.tensor(tokens, device=self._device),
            self._attention(spans),
            lambda layer, hidden: run_persona_ffn(hidden, layer, segments, self._rows),
        )
        return hidden.index_select(0, torch.tensor(keep, dtype=torch.int64, device=self._device))

    def _replayed(self, chunks: list[Chunk]) -> torch.Tensor | None:
        """What the decoder leaves of the planned `chunks`, by slot; None where no graph was replayed."""
        personas = self._plan.personas
        if self._graphs is None or personas is None:
            return None
        rows = [
            DecodeRow(chunk.sequence.slot, chunk.sequence.tokens[chunk.start], chunk.start, persona)
            for chunk, persona in zip(chunks, personas, strict=True)
        ]
        return self._graphs.run(rows, self._plan.segments[0])

    def _attention(self, spans: Rows[Span]) -> StepAttention:
        if self._device.type == "cpu":
            return CPUAttention(self._kv, self._decoder.rotary, spans)
        return TorchAttention(self._kv, self._decoder.rotary, spans, self._device)

    def _planned(self, chunks: list[Chunk]) -> tuple[list[Chunk], tuple[FFNSegment, ...]]:
        """The chunks in the order of their rows, and the packs those rows run on."""
        runs = tuple(_run(chunk) for chunk in chunks)
        resident = self.packs.resident
        if self._graphs is not None and resident is not self._plan.resident:
            self._graphs.keep([self._dense, *resident.packs.values()])
        if runs != self._plan.runs or resident is not self._plan.resident:
            self._plan = self._new_plan(chunks, runs, resident)
        return [chunks[index] for index in self._plan.order], self._plan.segments

    def _new_plan(self, chunks: list[Chunk], runs: tuple[Run, ...], resident: Resident) -> _Plan:
        order: list[int] = []
        segments: list[FFNSegment] = []
        row = 0
        for planned in plan_step(runs, resident.facts, self._costs):
            members = [chunks[index] for index in planned.runs]
            stop = row + sum(chunk.num_tokens for chunk in members)
            if planned.pack is None:
                segments.append(self._dense_segment(members, row, stop))
            else:
                segments.append(self._member_segment(members, row, stop, resident, planned.pack))
            order += planned.runs
            row = stop
        return _Plan(runs, resident, tuple(order), tuple(segments), self._personas_to_replay(runs, segments))

    def _personas_to_replay(self, runs: Rows[Run], segments: Rows[FFNSegment]) -> tuple[int, ...] | None:
        """Graphs are of single tokens on one pack of the base's own weights, without low-rank updates."""
        decodes = all(run.num_tokens == 1 and not run.own for run in runs)
        if self._graphs is None or not decodes or len(segments) != 1 or segments[0].loras:
            return None
        personas = segments[0].personas
        return (BASE_ROW,) * len(runs) if personas is None else tuple(personas.tolist())

    def _dense_segment(self, chunks: Rows[Chunk], start: int, stop: int) -> FFNSegment:
        functions = [chunk.sequence.request.function for chunk in chunks]
        subnetworks = [function.subnetwork for function in functions if function.subnetwork is not None]
        if not subnetworks:
            return FFNSegment(start, stop, self._dense)
        row_of: dict[str | None, int] = {None: BASE_ROW}
        row_of.update(self._table.rows_of(subnetworks))
        biased = self._table.has_biases(subnetwork.digest for subnetwork in subnetworks)
        loras = lora_rows(_digests(chunks), self._table.loras, self._device)
        return FFNSegment(start, stop, self._dense, self._personas(chunks, row_of), self._table, biased, loras)

    def _member_segment(self, chunks: Rows[Chunk], start: int, stop: int, resident: Resident, key: str) -> FFNSegment:
        pack = resident.packs[key]
        assert pack.members is not None
        row_of: dict[str | None, int] = {digest: row for row, digest in enumerate(pack.members)}
        loras = lora_rows(_digests(chunks), pack.loras, self._device)
        return FFNSegment(start, stop, pack, self._personas(chunks, row_of), loras=loras)

    def _personas(self, chunks: Rows[Chunk], row_of: dict[str | None, int]) -> torch.Tensor:
        """Int64 `[num_tokens]`: the row of the coefficients that each token's persona has."""
        return torch.tensor([row_of[digest] for digest in _digests(chunks)], device=self._device)


def _with_states(sampled: list[SampledToken], sampling: Rows[Sequence], states: torch.Tensor) -> list[SampledToken]:
    """The tokens, each with its row of `states` where the request asked for it."""
    if not any(one.request.return_hidden_states for one in sampling):
        return sampled
    rows = states.cpu().unbind()
    return [
        replace(token, hidden_state=row) if one.request.return_hidden_states else token
        for token, one, row in zip(sampled, sampling, rows, strict=True)
    ]


def _run(chunk: Chunk) -> Run:
    """What the planner sees of a chunk; seeded requests stay on the dense pack."""
    own = chunk.sequence.request.function.has_own_ffn
    return Run(_persona(chunk), chunk.num_tokens, pinned=chunk.sequence.sampling.seed is not None, own=own)


def _digests(chunks: Rows[Chunk]) -> list[str | None]:
    """Of each token's persona."""
    return [persona for chunk in chunks for persona in [_persona(chunk)] * chunk.num_tokens]


def _persona(chunk: Chunk) -> str | None:
    subnetwork = chunk.sequence.request.function.subnetwork
    return None if subnetwork is None else subnetwork.digest


def _layout_order(chunk: Chunk) -> tuple[bool, int]:
    return chunk.num_tokens > 1, chunk.sequence.slot


def _spans(chunks: Rows[Chunk]) -> list[Span]:
    spans: list[Span] = []
    row = 0
    for chunk in chunks:
        spans.append(Span(chunk.sequence.slot, row, chunk.num_tokens, chunk.start))
        row += chunk.num_tokens
    return spans
