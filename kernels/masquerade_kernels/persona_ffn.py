"""The persona FFN of one layer over a planned step: each segment of rows through its pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from masquerade_kernels.coefficients import CoefficientTable
from masquerade_kernels.gathered import GatheredLayerPack, gathered_ffn
from masquerade_kernels.lora import LoraRows
from masquerade_kernels.packs import Pack
from masquerade_kernels.rows import RowOps


@dataclass(frozen=True, slots=True)
class FFNSegment:
    """Consecutive rows of a step and the pack they run on."""

    start: int
    stop: int
    pack: Pack
    personas: torch.Tensor | None = None  # int64 [stop - start]: each row's row of the coefficients; None: all 1
    table: CoefficientTable | None = None  # whose rows these are; None: the pack's own
    biased: bool = False  # whether any of the personas has biases, where they are the table's
    loras: tuple[LoraRows, ...] = ()  # of the personas among them that have low-rank updates

    def coefficients(self, layer: int) -> torch.Tensor | None:
        """Float32 `[num_personas, |U|]`; None: all of them 1."""
        if self.personas is None:
            return None
        return self.pack.layers[layer].coefficients if self.table is None else self.table.scales(layer)

    def biases(self, layer: int) -> torch.Tensor | None:
        """Float32 `[num_personas, hidden]`; None where nobody has any."""
        if self.personas is None:
            return None
        if self.table is None:
            return self.pack.layers[layer].biases
        return self.table.biases(layer) if self.biased else None


def run_persona_ffn(
    hidden: torch.Tensor,  # [num_tokens, hidden]
    layer: int,
    segments: Sequence[FFNSegment],  # cover all rows, in order
    rows: RowOps,
) -> torch.Tensor:
    """`[num_tokens, hidden]`: every row through its segment's pack under its own persona's coefficients."""
    if len(segments) == 1:
        return _run_segment(hidden, layer, segments[0], rows)
    return torch.cat([_run_segment(hidden[segment.start : segment.stop], layer, segment, rows) for segment in segments])


def _run_segment(hidden: torch.Tensor, layer: int, segment: FFNSegment, rows: RowOps) -> torch.Tensor:
    pack = segment.pack.layers[layer]
    if isinstance(pack, GatheredLayerPack):
        assert not segment.loras, "gathered packs hold nobody with low-rank updates"
        scales, biases = segment.coefficients(layer), segment.biases(layer)
        return gathered_ffn(hidden, pack.weights, pack.neurons, scales, segment.personas, biases)
    if segment.loras:
        gate_up = pack.gate_up(hidden)
        for lora in segment.loras:
            lora.add_gate_up(layer, hidden, gate_up)
        activations = rows.swiglu(gate_up, segment.coefficients(layer), segment.personas)
    else:
        activations = pack.activations(hidden, segment.coefficients(layer), segment.personas, rows)
    output: torch.Tensor = pack.down(activations)
    for lora in segment.loras:
        lora.add_down(layer, activations, output)
    biases = segment.biases(layer)
    if biases is not None:
        assert segment.personas is not None
        output.add_(biases.index_select(0, segment.personas))
    return output
