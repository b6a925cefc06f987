"""A persona FFN of two small layers: its weights, personas, segments and reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from masquerade_kernels import (
    CoefficientTable,
    FFNLayer,
    FFNSegment,
    Pack,
    PackFormat,
    lora_factors,
    lora_rows,
    persona_ffn_reference,
)
from masquerade_kernels.rows import CompiledRows, RowOps, TorchRows
from masquerade_masks import FFNShape, Mask, SubNetwork

CPU = torch.device("cpu")
FP32, BF16 = PackFormat(torch.float32, CPU), PackFormat(torch.bfloat16, CPU)
LAYERS = 2
ROWS: list[RowOps] = [TorchRows(), CompiledRows(torch.float32, 1), CompiledRows(torch.float32, 2)]


@dataclass
class Weights:
    made: list[FFNLayer]

    def layers(self) -> Iterator[FFNLayer]:
        yield from self.made


def make_weights(intermediate: int, hidden: int, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(intermediate)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    return Weights(
        [
            FFNLayer(normal(intermediate, hidden), normal(intermediate, hidden), normal(hidden, intermediate))
            for _ in range(LAYERS)
        ]
    )


def make_subnetwork(
    intermediate: int, hidden: int, kept: int, seed: int, *, gain: bool = False, bias: bool = False
) -> SubNetwork:
    generator = np.random.default_rng(seed)
    indices = np.stack([generator.permutation(intermediate)[:kept] for _ in range(LAYERS)])
    return SubNetwork(
        "a-base",
        FFNShape(LAYERS, intermediate, hidden),
        Mask.from_kept_indices(indices, intermediate),
        gain=generator.normal(1, 0.3, (LAYERS, kept)).astype(np.float16) if gain else None,
        bias=generator.normal(0, 0.3, (LAYERS, hidden)).astype(np.float16) if bias else None,
    )


def reference(weights: Weights, layer: int, hidden: torch.Tensor, persona: SubNetwork | None) -> torch.Tensor:
    part = weights.made[layer]
    coefficients = None if persona is None else torch.from_numpy(persona.coefficients())[layer]
    biases = None if persona is None else persona.biases()
    bias = None if biases is None else torch.from_numpy(biases)[layer]
    weights_of = None if persona is None else persona.weights
    lora = None if weights_of is None else lora_factors(weights_of, layer)
    return persona_ffn_reference(hidden, part.gate, part.up, part.down, coefficients, bias, lora)


def dense_segment(pack: Pack, table: CoefficientTable, personas: list[SubNetwork | None], start: int = 0) -> FFNSegment:
    rows = table.rows_of([persona for persona in personas if persona is not None])
    table_rows = torch.tensor([0 if persona is None else rows[persona.digest] for persona in personas])
    loras = lora_rows([persona and persona.digest for persona in personas], table.loras, CPU)
    return FFNSegment(start, start + len(personas), pack, table_rows, table, table.has_biases(rows), loras)


def member_segment(pack: Pack, personas: list[SubNetwork], start: int = 0) -> FFNSegment:
    assert pack.members is not None
    rows = torch.tensor([pack.members.index(persona.digest) for persona in personas])
    loras = lora_rows([persona.digest for persona in personas], pack.loras, CPU)
    return FFNSegment(start, start + len(personas), pack, rows, loras=loras)
