"""PEFT itself reads the adapters that are written here, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from masquerade_engine import Base
from masquerade_engine.reference import reference_logits
from masquerade_kernels import lora_factors
from masquerade_masks import Attached, Mask, SubNetwork, read_peft, write_peft


def test_an_adapter_is_the_same_function_in_peft(
    tiny_base: Base,
    tiny_base_dir: Path,
    make_attached: Callable[..., Attached],
    prompt_of: Callable[..., tuple[int, ...]],
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    shape = tiny_base.shape
    lora = make_attached("lora", shape, shape.intermediate_size, dtype=np.float32)
    write_peft(lora, tmp_path / "ours", base_model=str(tiny_base_dir))
    stock = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(stock, tmp_path / "ours")
    tokens = torch.tensor([prompt_of(1)])
    with torch.no_grad():
        theirs = adapted(input_ids=tokens).logits
    factors = [lora_factors(lora, layer) for layer in range(shape.num_layers)]
    ours = reference_logits(tiny_base.build_model(), tokens, lora=factors)
    assert (ours - theirs).abs().max() < 1e-4

    adapted.save_pretrained(tmp_path / "theirs")
    back = read_peft(tmp_path / "theirs")
    assert back == lora
    everything = Mask.from_dense(np.ones((shape.num_layers, shape.intermediate_size), np.bool_))
    subnetwork = replace(SubNetwork(tiny_base.fingerprint, shape, everything), weights=back)
    assert subnetwork.attached == (("lora", lora.digest),)
