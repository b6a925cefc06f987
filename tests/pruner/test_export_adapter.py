"""A persona as a PEFT adapter, loaded by PEFT, computes what the reference computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from masquerade_engine.base import Base, load_base
from masquerade_masks import BaseMismatch, SettingError, SubNetwork, read_peft
from masquerade_pruner.export import ExportedPersona, export_adapter

MakeSubnetwork = Callable[..., SubNetwork]
Logits = Callable[..., torch.Tensor]

NETTIE = ExportedPersona("nettie", 3, "You are Nettie. You brew.")
TOKENS = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def adapted_logits(folder: Path) -> torch.Tensor:
    """Of the model that the adapter itself names."""
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder)
    logits: torch.Tensor = adapted(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("kind", [None, "lora"])
def test_the_adapter_is_the_persona(
    make_tiny_base: Callable[..., Path],
    make_subnetwork: MakeSubnetwork,
    persona_logits: Logits,
    tmp_path: Path,
    model_type: str,
    gain: bool,
    kind: str | None,
) -> None:
    path = make_tiny_base(tmp_path / "base", model_type)
    base = load_base(str(path), cache_dir=tmp_path, dtype="fp32", device="cpu")
    subnetwork = make_subnetwork(base, gain=gain, kind=kind)
    out = export_adapter(base, subnetwork, tmp_path / "adapter", NETTIE)
    assert (adapted_logits(out) - persona_logits(base, subnetwork, TOKENS)).abs().max() <= 1e-4


def test_a_mask_alone_adapts_the_whole_base(tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path) -> None:
    out = export_adapter(tiny_base, make_subnetwork(tiny_base), tmp_path / "out", NETTIE)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_base.path)


def test_low_rank_updates_adapt_the_pruned_checkpoint(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    subnetwork = make_subnetwork(tiny_base, kind="lora")
    out = export_adapter(tiny_base, subnetwork, tmp_path / "out", NETTIE)
    lora = read_peft(out)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert lora.tensors[name].shape == (4, subnetwork.mask.kept)
    assert "Nettie" in AutoTokenizer.from_pretrained(out / "checkpoint").chat_template


def test_what_an_adapter_cannot_hold_is_refused(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="own FFN weights"):
        export_adapter(tiny_base, make_subnetwork(tiny_base, kind="full"), tmp_path / "out", NETTIE)
    with pytest.raises(SettingError, match="biases"):
        export_adapter(tiny_base, make_subnetwork(tiny_base, bias=True), tmp_path / "out", NETTIE)
    ours = make_subnetwork(tiny_base)
    with pytest.raises(BaseMismatch):
        export_adapter(tiny_base, SubNetwork("0" * 64, ours.shape, ours.mask), tmp_path / "out", NETTIE)
    assert not (tmp_path / "out").exists()
