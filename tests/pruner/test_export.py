"""Masked dense, and the exported checkpoint in plain transformers, compute the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from masquerade_engine.base import Base, load_base
from masquerade_engine.reference import reference_logits
from masquerade_masks import BaseMismatch, Mask, SettingError, SubNetwork, round_kept
from masquerade_pruner.export import export_checkpoint


def _subnetwork(base: Base, *, gain: bool = False) -> SubNetwork:
    rng = np.random.default_rng(0)
    shape = base.shape
    kept = round_kept(shape.intermediate_size, 0.5)
    indices = np.stack([rng.permutation(shape.intermediate_size)[:kept] for _ in range(shape.num_layers)])
    mask = Mask.from_kept_indices(np.sort(indices, axis=1).astype(np.int32), shape.intermediate_size)
    gains = rng.uniform(0.5, 1.5, (shape.num_layers, kept)).astype(np.float16) if gain else None
    return SubNetwork(base.fingerprint, shape, mask, gain=gains)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("gain", [False, True])
def test_exported_checkpoint_equals_masked_dense(
    make_tiny_base: Callable[..., Path], tmp_path: Path, model_type: str, gain: bool
) -> None:
    base = load_base(str(make_tiny_base(tmp_path / "base", model_type)), cache_dir=tmp_path, dtype="fp32", device="cpu")
    subnetwork = _subnetwork(base, gain=gain)
    out = export_checkpoint(base, subnetwork, tmp_path / "exported")
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert AutoConfig.from_pretrained(out).intermediate_size == subnetwork.mask.kept
    tokens = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = stock(input_ids=tokens).logits
    coefficients = torch.from_numpy(subnetwork.coefficients())
    masked = reference_logits(base.build_model(), tokens, coefficients)
    assert float((exported - masked).abs().max()) <= 1e-4
    assert AutoTokenizer.from_pretrained(out).chat_template == base.tokenizer.chat_template


def test_a_mask_of_another_base_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    ours = _subnetwork(tiny_base)
    other = SubNetwork("0" * 64, ours.shape, ours.mask)
    with pytest.raises(BaseMismatch):
        export_checkpoint(tiny_base, other, tmp_path / "out")


def test_what_the_family_cannot_hold_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    ours = _subnetwork(tiny_base)
    bias = np.zeros((ours.shape.num_layers, ours.shape.hidden_size), np.float16)
    with pytest.raises(SettingError, match="biases"):
        export_checkpoint(tiny_base, SubNetwork(ours.base, ours.shape, ours.mask, bias=bias), tmp_path / "out")


def test_a_directory_with_something_in_it_is_left_alone(tiny_base: Base, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(SettingError, match="not empty"):
        export_checkpoint(tiny_base, _subnetwork(tiny_base), tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


@pytest.mark.real_model
def test_exported_bundled_model_equals_masked_dense(bundled_base: Base, tmp_path: Path) -> None:
    base = bundled_base
    subnetwork = _subnetwork(base)
    out = export_checkpoint(base, subnetwork, tmp_path / "exported")
    tokens = torch.randint(40_000, (1, 48), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        exported = stock(input_ids=tokens).logits
    masked = reference_logits(base.build_model(torch.float32), tokens, torch.from_numpy(subnetwork.coefficients()))
    assert float((exported - masked).abs().max()) <= 1e-3
