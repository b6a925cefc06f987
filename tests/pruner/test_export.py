"""A persona on the base, and the exported checkpoint in plain transformers, compute the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from masquerade_engine.base import Base, load_base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import AttachedNotFound, BaseMismatch, SettingError, SubNetwork
from masquerade_pruner.export import ExportedPersona, export_checkpoint

MakeSubnetwork = Callable[..., SubNetwork]
Logits = Callable[..., torch.Tensor]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
NETTIE = ExportedPersona("nettie", 3, "You are Nettie. You brew.\n\nStay in character.")
TOKENS = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))


def family(make_tiny_base: Callable[..., Path], tmp_path: Path, model_type: str) -> Base:
    return load_base(str(make_tiny_base(tmp_path / "base", model_type)), cache_dir=tmp_path, dtype="fp32", device="cpu")


@torch.no_grad()
def stock_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(input_ids=token_ids).logits
    return logits


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("gain", "kind"), [(False, None), (True, None), (False, "lora"), (True, "lora"), (True, "full")]
)
def test_the_checkpoint_is_the_persona(
    make_tiny_base: Callable[..., Path],
    make_subnetwork: MakeSubnetwork,
    persona_logits: Logits,
    tmp_path: Path,
    model_type: str,
    gain: bool,
    kind: str | None,
) -> None:
    base = family(make_tiny_base, tmp_path, model_type)
    subnetwork = make_subnetwork(base, gain=gain, kind=kind)
    out = export_checkpoint(base, subnetwork, tmp_path / "exported", NETTIE)
    assert AutoConfig.from_pretrained(out).intermediate_size == subnetwork.mask.kept
    assert (stock_logits(out, TOKENS) - persona_logits(base, subnetwork, TOKENS)).abs().max() <= 1e-4


def test_biases_go_where_the_family_has_them(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, persona_logits: Logits, tmp_path: Path
) -> None:
    subnetwork = make_subnetwork(tiny_base, gain=True, bias=True)
    out = export_checkpoint(tiny_base, subnetwork, tmp_path / "out", NETTIE)
    assert (stock_logits(out, TOKENS) - persona_logits(tiny_base, subnetwork, TOKENS)).abs().max() <= 1e-4


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_biases_are_refused_where_the_family_has_none(
    make_tiny_base: Callable[..., Path], make_subnetwork: MakeSubnetwork, tmp_path: Path, model_type: str
) -> None:
    base = family(make_tiny_base, tmp_path, model_type)
    with pytest.raises(SettingError, match=f"biases.* {model_type} checkpoint") as refused:
        export_checkpoint(base, make_subnetwork(base, bias=True), tmp_path / "out", NETTIE)
    assert refused.value.field == "format"
    assert not (tmp_path / "out").exists()


def test_weights_are_stored_as_the_bases_own_are(
    make_tiny_base: Callable[..., Path], make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    folder = make_tiny_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    base = load_base(str(folder), cache_dir=tmp_path, dtype="fp32", device="cpu")
    subnetwork = make_subnetwork(base)
    for dtype, stored in ((None, "bfloat16"), (torch.float32, "float32")):
        out = export_checkpoint(base, subnetwork, tmp_path / stored, NETTIE, dtype=dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == stored


def test_the_checkpoint_chats_in_character(tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path) -> None:
    before = tiny_base.tokenizer.chat_template
    out = export_checkpoint(tiny_base, make_subnetwork(tiny_base), tmp_path / "out", NETTIE)
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Who are you?"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert rendered == render_chat(tiny_base.tokenizer, NETTIE.system_prompt, [ChatMessage("user", "Who are you?")])
    assert tiny_base.tokenizer.chat_template == before
    card = (out / "README.md").read_text()
    assert "> You are Nettie. You brew." in card
    assert "puts it first by itself" in card
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == sorted(tiny_base.stop_token_ids)


def test_without_a_known_prompt_the_template_stays(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    out = export_checkpoint(tiny_base, make_subnetwork(tiny_base), tmp_path / "out", ExportedPersona("nettie", 3))
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_base.tokenizer.chat_template
    assert "persona's prompt" not in (out / "README.md").read_text()


def test_a_mask_of_another_base_is_refused(tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path) -> None:
    ours = make_subnetwork(tiny_base)
    other = SubNetwork("0" * 64, ours.shape, ours.mask)
    with pytest.raises(BaseMismatch):
        export_checkpoint(tiny_base, other, tmp_path / "out", NETTIE)


def test_weights_that_are_not_here_are_missed(tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path) -> None:
    ours = make_subnetwork(tiny_base)
    named = SubNetwork(ours.base, ours.shape, ours.mask, attached=(("lora", "0" * 64),))
    with pytest.raises(AttachedNotFound):
        export_checkpoint(tiny_base, named, tmp_path / "out", NETTIE)


def test_a_directory_with_something_in_it_is_left_alone(
    tiny_base: Base, make_subnetwork: MakeSubnetwork, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("keep me")
    for taken in (tmp_path, precious):
        with pytest.raises(SettingError, match="name a new folder"):
            export_checkpoint(tiny_base, make_subnetwork(tiny_base), taken, NETTIE)
    assert precious.read_text() == "keep me"


@pytest.mark.real_model
def test_exported_bundled_model_equals_masked_dense(
    bundled_base: Base, make_subnetwork: MakeSubnetwork, persona_logits: Logits, tmp_path: Path
) -> None:
    subnetwork = make_subnetwork(bundled_base)
    out = export_checkpoint(bundled_base, subnetwork, tmp_path / "exported", NETTIE)
    tokens = torch.randint(40_000, (1, 48), generator=torch.Generator().manual_seed(0))
    masked = persona_logits(bundled_base, subnetwork, tokens)
    assert float((stock_logits(out, tokens) - masked).abs().max()) <= 1e-3
    assert np.array_equal(stock_logits(out, tokens).argmax(-1), masked.argmax(-1))
