"""A random model as a GGUF file, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
_HEAD_DIM = {"qwen3": 128}  # what transformers takes for granted when it reads such a GGUF file; the others: 32
_NUM_SAID = 94  # the first tokens are printable ASCII


def write_tiny_gguf(path: Path, model_type: str, stored: GGMLQuantizationType, chat_template: str) -> Path:
    """A model of that family whose matrices are stored as `stored`, with a byte-level tokenizer.

    It reads every byte and says printable ASCII alone: llama.cpp's server holds back a token that cuts a character.
    """
    tokens = [*sorted(ByteLevel.alphabet()), "Ġt", "<|im_end|>", "<|im_start|>"]
    sizes = SIZES | {"head_dim": _HEAD_DIM.get(model_type, 32)}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokens), tie_word_embeddings=True, **sizes)
    writer = GGUFWriter(path, model_type)
    _add_sizes(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 2) + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)
    writer.add_array("general.tags", ["tiny"])
    names = gguf.get_tensor_name_map(_architecture(model_type), config.num_hidden_layers)
    for name, weight in _random_weights(config).items():
        stem, suffix = name.rsplit(".", 1)
        permuted = _permuted(stem, weight, config) if model_type == "llama" else weight
        kind = stored if permuted.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(permuted, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)


def _random_weights(config: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        model.get_input_embeddings().weight.data[_NUM_SAID:] *= 0.01
    return {name: weight.numpy() for name, weight in model.state_dict().items() if name != "lm_head.weight"}


def _permuted(stem: str, weight: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    """llama.cpp's llama rotates neighbouring pairs, transformers' the two halves of a head."""
    part = stem.rsplit(".", 1)[-1]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _architecture(model_type: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)
