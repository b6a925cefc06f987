from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from masquerade_engine import Base, load_base
from masquerade_engine.context import active_context
from masquerade_engine.reference import reference_logits
from masquerade_engine.seams import persona_ffns
from masquerade_masks import BaseNotFound, SettingError, UnsupportedModel

MakeBase = Callable[..., Path]


def changed(directory: Path, **config: Any) -> Path:
    """Give the base another config without its weights."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def test_a_directory_is_loaded_with_what_it_says(tiny_base: Base) -> None:
    assert (tiny_base.shape.num_layers, tiny_base.shape.intermediate_size, tiny_base.shape.hidden_size) == (3, 96, 32)
    assert tiny_base.context_length == 512
    assert tiny_base.stop_token_ids == {tiny_base.tokenizer.eos_token_id}
    assert tiny_base.dtype == torch.float32
    assert len(tiny_base.fingerprint) == 64
    assert tiny_base.name == tiny_base.path.name


def test_the_seams_leave_the_model_as_it_was(tiny_base: Base) -> None:
    tokens = torch.arange(20)[None]
    stock = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    with torch.no_grad():
        expected = stock(tokens).logits
    model = tiny_base.build_model()
    torch.testing.assert_close(reference_logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(stock.state_dict())
    assert [ffn.layer for ffn in persona_ffns(model)] == [0, 1, 2]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_seams_runs_in_a_context_only(tiny_base: Base) -> None:
    with pytest.raises(LookupError, match="forward_context"):
        active_context()
    with pytest.raises(LookupError):
        tiny_base.build_model()(torch.arange(4)[None])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_what_cannot_be_masked_is_refused(
    config: dict[str, Any], said: str, tmp_path: Path, make_tiny_base: MakeBase
) -> None:
    directory = changed(make_tiny_base(tmp_path / "base"), **config)
    with pytest.raises(UnsupportedModel, match=said):
        load_base(str(directory), cache_dir=tmp_path / "cache")


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, said in (
        (str(tmp_path / "empty"), "no config.json"),
        (str(tmp_path / "missing.gguf"), "no such GGUF file"),
        (str(tmp_path / "missing"), "neither"),
        ("nobody/nothing-at-all", "the hub gave no snapshot"),
    ):
        with pytest.raises(BaseNotFound, match=said) as refused:
            load_base(spec, cache_dir=tmp_path / "cache")
        assert refused.value.spec == spec


@pytest.mark.parametrize(("setting", "value"), [("dtype", "int3"), ("device", "abacus"), ("device", "cuda")])
def test_a_dtype_or_device_that_is_not_to_be_had(setting: str, value: str, tiny_base_dir: Path, tmp_path: Path) -> None:
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(SettingError) as refused:
        load_base(str(tiny_base_dir), cache_dir=tmp_path, **settings)
    assert refused.value.field == setting
