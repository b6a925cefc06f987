"""Export: a persona's sub-network as a stock Hugging Face checkpoint with a smaller `intermediate_size`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from masquerade_engine.base import Base
from masquerade_engine.seams import persona_ffns
from masquerade_masks import BaseMismatch, SettingError, SubNetwork

_DTYPE = torch.float32  # a base that was dequantised from GGUF has no narrower form that is exact


@torch.no_grad()
def export_checkpoint(base: Base, subnetwork: SubNetwork, out_dir: Path, *, dtype: torch.dtype = _DTYPE) -> Path:
    """Write the sub-network to `out_dir`, loadable by plain transformers; return `out_dir`.

    Dropping neuron i drops row i of gate and up and column i of down. Gains are folded into the down projection, here
    alone. Raises `BaseMismatch`, and `SettingError` for a directory that is not empty or a function that the family
    cannot hold (an FFN output bias, attached weights).
    """
    if subnetwork.base != base.fingerprint:
        raise BaseMismatch(base.fingerprint, subnetwork.base)
    if subnetwork.bias is not None or subnetwork.attached:
        held = "biases" if subnetwork.bias is not None else "attached weights"
        raise SettingError("format", f"a {base.config.model_type} checkpoint cannot hold this persona's {held}")
    if out_dir.exists() and any(out_dir.iterdir()):
        raise SettingError("output", f"{out_dir} is not empty; choose a new directory")
    model = base.build_model(dtype)
    kept = torch.from_numpy(subnetwork.mask.kept_indices()).long()  # [layers, kept]
    coefficients = torch.from_numpy(subnetwork.coefficients())
    for layer, ffn in enumerate(persona_ffns(model)):
        gate, up, down = (ffn.get_submodule(f"{name}_proj") for name in ("gate", "up", "down"))
        rows = kept[layer].to(base.device)
        gains = coefficients[layer][kept[layer]].to(base.device)
        gate.weight = _frozen(gate.get_parameter("weight")[rows])
        up.weight = _frozen(up.get_parameter("weight")[rows])
        down.weight = _frozen((down.get_parameter("weight")[:, rows].float() * gains).to(dtype))
    stock: Any = model
    stock.config.intermediate_size = subnetwork.mask.kept
    stock.save_pretrained(out_dir)
    base.tokenizer.save_pretrained(out_dir)
    _strip_attention_name(out_dir / "config.json")
    return out_dir


def _frozen(weight: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(weight.contiguous(), requires_grad=False)


def _strip_attention_name(config: Path) -> None:
    """The checkpoint must not ask for this project's attention, should a transformers release write it down."""
    settings = json.loads(config.read_text("utf-8"))
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        settings.pop(key, None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
