"""The persona FFN of one layer over a planned step: each segment of rows through its pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from masquerade_kernels.coefficients import CoefficientTable
from masquerade_kernels.packs import LayerPack, Pack


@dataclass(frozen=True, slots=True)
class FFNSegment:
    """Consecutive rows of a step and the pack they run on."""

    start: int
    stop: int
    pack: Pack
    table_rows: torch.Tensor | None = None  # int64 [stop - start], dense only; None: all of them the base
    digests: frozenset[str] = frozenset()  # the personas among `table_rows`


def run_persona_ffn(
    hidden: torch.Tensor,  # [num_tokens, hidden]
    layer: int,
    segments: Sequence[FFNSegment],  # cover all rows, in order
    table: CoefficientTable,
) -> torch.Tensor:
    """`[num_tokens, hidden]`: every row through its segment's pack under its own persona's coefficients."""
    outputs = [_run_segment(hidden[segment.start : segment.stop], layer, segment, table) for segment in segments]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _run_segment(hidden: torch.Tensor, layer: int, segment: FFNSegment, table: CoefficientTable) -> torch.Tensor:
    pack = segment.pack.layers[layer]
    activations = _activations(pack, hidden)
    rows = segment.table_rows
    # In-place, the product of bf16 and float32 is taken in float32 and rounded once.
    if rows is not None:
        activations.mul_(table.scales(layer).index_select(0, rows))
    elif pack.gain is not None:
        activations.mul_(pack.gain)
    output: torch.Tensor = pack.down(activations)
    if rows is not None:
        biases = table.biases(layer, segment.digests)
        if biases is not None:
            output.add_(biases.index_select(0, rows))
    elif pack.bias is not None:
        output.add_(pack.bias)
    return output


def _activations(pack: LayerPack, hidden: torch.Tensor) -> torch.Tensor:
    """`silu(x W_gateᵀ) ⊙ (x W_upᵀ)` over the pack's neurons, `[num_tokens, |U|]`."""
    gate, up = pack.gate_up(hidden).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
