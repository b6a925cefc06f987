"""A persona as a PEFT adapter.

A mask and its gains factor the input of every down projection, which is what IA3 does: without further weights the
persona is an adapter of the *unpruned* base. `lora` lives on the kept neurons, and PEFT applies no two kinds at once:
its adapter is for the pruned checkpoint, which is written beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from masquerade_engine.base import Base
from masquerade_masks import SettingError, SubNetwork, write_json_atomic, write_peft
from masquerade_masks.peft_adapter import CONFIG_NAME, WEIGHTS_NAME
from masquerade_pruner.export.checkpoint import check_base, check_empty, export_checkpoint
from masquerade_pruner.export.model_card import write_model_card
from masquerade_pruner.export.persona import ExportedPersona
from masquerade_pruner.export.pruned_ffn import PrunedFFN

_IA3_NAME = "base_model.model.model.layers.{layer}.mlp.down_proj.ia3_l"
_HOW = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{adapted}")
tokenizer = AutoTokenizer.from_pretrained("{adapted}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def export_adapter(base: Base, subnetwork: SubNetwork, out_dir: Path, persona: ExportedPersona) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` to `out_dir`, and for `lora` `out_dir/checkpoint`.

    Raises `BaseMismatch`, `AttachedNotFound`, and `SettingError` for a directory that is not empty, biases that the
    checkpoint or IA3 has no place for, and `full`.
    """
    check_base(base, subnetwork)
    if subnetwork.has_own_ffn:
        raise SettingError(
            "format", "an adapter cannot hold this persona's own FFN weights (recovery full); export hf or gguf"
        )
    if not subnetwork.attached and subnetwork.bias is not None:
        raise SettingError("format", "an IA3 adapter has no place for this persona's biases; export hf or gguf")
    check_empty(out_dir)
    if subnetwork.attached:
        lora = PrunedFFN(subnetwork).low_rank()
        pruned = replace(subnetwork, attached=(), weights=None)
        checkpoint = export_checkpoint(base, pruned, out_dir / "checkpoint", persona)
        write_peft(lora, out_dir, base_model=str(checkpoint.resolve()))
        adapted = "path/to/this/folder/checkpoint"
        what = "What recovery learned for a persona, as a LoRA adapter of the pruned checkpoint in `checkpoint/`."
    else:
        adapted = str(base.path.resolve())
        what = f"The mask of a persona, as an IA3 adapter of the whole {base.name}."
        _write_ia3(subnetwork, out_dir, adapted)
    how = _HOW.format(adapted=adapted)
    write_model_card(out_dir, base, subnetwork, persona, what=what, how=how, tags=["persona", "peft"])
    return out_dir


def _write_ia3(subnetwork: SubNetwork, out_dir: Path, base_model: str) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    coefficients = torch.from_numpy(subnetwork.coefficients())  # [layers, intermediate]
    vectors = {_IA3_NAME.format(layer=layer): row[None].contiguous() for layer, row in enumerate(coefficients)}
    save_file(vectors, out_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": ["down_proj"],
        "feedforward_modules": ["down_proj"],  # factors of the layer's input, not of its output
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json_atomic(out_dir / CONFIG_NAME, config)
