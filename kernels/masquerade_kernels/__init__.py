"""The persona FFN: its float64 oracle, packed execution, and the planner that chooses packs.

Names are imported on first use, so that the planner is reached without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masquerade_kernels.coefficients import CoefficientTable
    from masquerade_kernels.gathered import GatheredLayer, GatheredLayerPack, GatheredWeights, can_gather
    from masquerade_kernels.linear import PackedLinear
    from masquerade_kernels.lora import LoraFactors, LoraLayer, LoraRows, lora_factors, lora_rows
    from masquerade_kernels.packs import (
        FFNLayer,
        FFNWeights,
        LayerPack,
        Pack,
        PackFormat,
        dense_pack,
        gathered_dense_pack,
        member_pack,
    )
    from masquerade_kernels.persona_ffn import FFNSegment, run_persona_ffn
    from masquerade_kernels.planner import PackFacts, RowCosts, Run, Segment, plan_step
    from masquerade_kernels.reference import persona_ffn_reference
    from masquerade_kernels.rows import RowOps, row_ops

__all__ = [
    "CoefficientTable",
    "FFNLayer",
    "FFNSegment",
    "FFNWeights",
    "GatheredLayer",
    "GatheredLayerPack",
    "GatheredWeights",
    "LayerPack",
    "LoraFactors",
    "LoraLayer",
    "LoraRows",
    "Pack",
    "PackFacts",
    "PackFormat",
    "PackedLinear",
    "RowCosts",
    "RowOps",
    "Run",
    "Segment",
    "can_gather",
    "dense_pack",
    "gathered_dense_pack",
    "lora_factors",
    "lora_rows",
    "member_pack",
    "persona_ffn_reference",
    "plan_step",
    "row_ops",
    "run_persona_ffn",
]

_MODULES = {
    "CoefficientTable": "coefficients",
    "FFNLayer": "packs",
    "FFNSegment": "persona_ffn",
    "FFNWeights": "packs",
    "GatheredLayer": "gathered",
    "GatheredLayerPack": "gathered",
    "GatheredWeights": "gathered",
    "LayerPack": "packs",
    "LoraFactors": "lora",
    "LoraLayer": "lora",
    "LoraRows": "lora",
    "Pack": "packs",
    "PackFacts": "planner",
    "PackFormat": "packs",
    "PackedLinear": "linear",
    "RowCosts": "planner",
    "RowOps": "rows",
    "Run": "planner",
    "Segment": "planner",
    "can_gather": "gathered",
    "dense_pack": "packs",
    "gathered_dense_pack": "packs",
    "lora_factors": "lora",
    "lora_rows": "lora",
    "member_pack": "packs",
    "persona_ffn_reference": "reference",
    "plan_step": "planner",
    "row_ops": "rows",
    "run_persona_ffn": "persona_ffn",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
