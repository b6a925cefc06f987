"""Family adapters: all that Masquerade knows about a model family in particular."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from masquerade_masks import FFNShape, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_UNSERVABLE_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class Family:
    """One supported `model_type`; its decoder blocks hold `mlp.{gate,up,down}_proj`."""

    model_type: str
    mlp_bias_key: str | None = None  # the config field that gives the MLP biases, where the family has one


FAMILIES = {
    family.model_type: family
    for family in (Family("llama", "mlp_bias"), Family("mistral"), Family("qwen2"), Family("qwen3"))
}


def family_of(config: PreTrainedConfig) -> Family:
    """The adapter for a config.

    Raises `UnsupportedModel` for a family without a gate/up/down FFN, an activation other than SiLU, MLP biases, and
    rotary scaling whose frequencies depend on the longest position in the batch (neighbours would leak in).
    """
    family = FAMILIES.get(config.model_type)
    supported = ", ".join(FAMILIES)
    if family is None:
        raise UnsupportedModel(
            f"model_type {config.model_type!r} is not supported; "
            f"the families with a gate/up/down FFN that are: {supported}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {config.hidden_act!r} is not supported; only silu is")
    if family.mlp_bias_key and getattr(config, family.mlp_bias_key, False):
        raise UnsupportedModel(f"{family.mlp_bias_key}=true is not supported; the FFN must have no biases of its own")
    rope_type = rope_parameters(config).get("rope_type", "default")
    if rope_type in _UNSERVABLE_ROPE:
        raise UnsupportedModel(
            f"rotary scaling {rope_type!r} is not supported: its frequencies depend on the longest request in a batch"
        )
    return family


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings, an empty mapping where the config holds none."""
    return dict(getattr(config, "rope_parameters", None) or {})


def ffn_shape(config: PreTrainedConfig) -> FFNShape:
    """Layers, FFN neurons a layer, and hidden size of a base."""
    return FFNShape(
        num_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        hidden_size=config.hidden_size,
    )


def num_parameters(config: PreTrainedConfig) -> int:
    """Weights of a base, an output head that is tied to the embedding counted once; norms and biases are left out."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layer = 3 * hidden * config.intermediate_size + 2 * hidden * head_dim * (heads + kv_heads)
    embeddings = 1 if config.tie_word_embeddings else 2
    return int(config.num_hidden_layers * layer + embeddings * config.vocab_size * hidden)
