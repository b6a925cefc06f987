"""One decoder forward for every supported family, over transformers' modules.

transformers builds and loads the model and computes the rotary table; between its linears stand the fused row
operations in place of the stock layers, whose dispatch alone cost 6.5 to 7.4 ms a step on SmolLM2-135M. The stock
forward stays the oracle (`reference.py`, the pruner) that this one is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from masquerade_engine.context import forward_context
from masquerade_engine.seams import PersonaFFN, RMSNorm, decoder_layers
from masquerade_kernels.linear import Linear, pack_linear
from masquerade_kernels.rows import Norm, RowOps


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None  # tokens that a query sees, its own included; None: all
    query_norm: Norm | None = None  # over each head, before the rotation
    key_norm: Norm | None = None


class StepAttention(Protocol):
    """The attention of one step's rows."""

    def attend(self, layer: int, shape: AttentionShape, qkv: torch.Tensor) -> torch.Tensor:
        """`[num_rows, (heads + 2 kv_heads) * head_dim]`, not yet rotated, to `[num_rows, heads * head_dim]`.

        Keys and values are put into their slots first. `qkv` may be changed.
        """
        ...


FFN = Callable[[int, torch.Tensor], torch.Tensor]  # (layer, [num_rows, hidden]) -> [num_rows, hidden]


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Rotary embedding by position, float32 `[max_len, head_dim / 2]` each."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Norm
    qkv: Linear
    attention: AttentionShape
    output: Linear
    ffn_norm: Norm


class Decoder:
    """A model's weights, packed, and its forward pass. The FFN's own weights are the packs' affair."""

    def __init__(self, model: nn.Module, rows: RowOps, max_len: int, *, int8: bool = False) -> None:
        """Takes `model`, a seamed causal language model, apart: each linear leaves it as it is read."""
        self._rows = rows
        self._embedding = model.get_parameter("model.embed_tokens.weight").detach()
        self.rotary = _rotary_table(model, max_len, self._embedding.device)
        calls = _recorded_calls(model)
        self._layers = [_layer(block, call, int8) for block, call in zip(decoder_layers(model), calls, strict=True)]
        self.attentions = tuple(layer.attention for layer in self._layers)
        self._last_norm = _norm(model.get_submodule("model.norm"))
        self._head = _fused([_linear(model, "lm_head")], int8)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[num_rows, vocab]` of rows of `hidden`'s output."""
        logits: torch.Tensor = self._head(hidden)
        return logits

    @torch.inference_mode()
    def hidden(self, token_ids: torch.Tensor, attention: StepAttention, ffn: FFN) -> torch.Tensor:
        """All layers and the last norm, int64 `[num_rows]` to `[num_rows, hidden]`."""
        rows, layers = self._rows, self._layers
        x = F.embedding(token_ids, self._embedding)
        normed = rows.norm(x, layers[0].input_norm)
        for index, layer in enumerate(layers):
            attended = attention.attend(index, layer.attention, layer.qkv(normed))
            normed = rows.add_norm(x, layer.output(attended), layer.ffn_norm)
            is_last = index + 1 == len(layers)
            norm = self._last_norm if is_last else layers[index + 1].input_norm
            normed = rows.add_norm(x, ffn(index, normed), norm)
        return normed


class _Recorder:
    """A forward context that notes how the family's own code calls attention, and computes nothing."""

    def __init__(self) -> None:
        self.calls: list[AttentionShape] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert layer == len(self.calls), "layers are called in order"
        _, num_heads, _, head_dim = query.shape
        self.calls.append(AttentionShape(num_heads, key.shape[1], head_dim, scaling, sliding_window))
        return query.transpose(1, 2)

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def norm(self, module: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@torch.inference_mode()
def _recorded_calls(model: nn.Module) -> list[AttentionShape]:
    """Every layer's attention, as one token's pass through the stock forward asks for it."""
    recorder = _Recorder()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.get_parameter("model.embed_tokens.weight").device)
    with forward_context(recorder):
        model(input_ids=token, use_cache=False)
    return recorder.calls


def _layer(block: nn.Module, call: AttentionShape, int8: bool) -> _Layer:
    attention = block.get_submodule("self_attn")
    return _Layer(
        _norm(block.get_submodule("input_layernorm")),
        _fused([_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")], int8),
        replace(call, query_norm=_optional_norm(attention, "q_norm"), key_norm=_optional_norm(attention, "k_norm")),
        _fused([_linear(attention, "o_proj")], int8),
        _norm(block.get_submodule("post_attention_layernorm")),
    )


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """A linear, taken out of its module so that its weight can be freed once it is packed."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    setattr(module, name, nn.Identity())
    return linear


def _fused(linears: Sequence[nn.Linear], int8: bool) -> Linear:
    """One linear whose outputs are those of all, in order."""
    if len(linears) == 1:
        return pack_linear(linears[0].weight.detach(), _detached(linears[0].bias), int8=int8)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [_detached(linear.bias) for linear in linears]
    bias = None
    if any(one is not None for one in biases):
        zeros = [weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat([zero if one is None else one for one, zero in zip(biases, zeros, strict=True)])
    return pack_linear(weight, bias, int8=int8)


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def _norm(module: nn.Module) -> Norm:
    return Norm(module.get_parameter("weight").detach(), float(getattr(module, "variance_epsilon")))  # noqa: B009


def _optional_norm(module: nn.Module, name: str) -> Norm | None:
    return _norm(module.get_submodule(name)) if hasattr(module, name) else None


@torch.inference_mode()
def _rotary_table(model: nn.Module, max_len: int, device: torch.device) -> RotaryTable:
    """The family's own rotary embedding, asked for every position in float32."""
    rotary = model.get_submodule("model.rotary_emb")
    cos, sin = rotary(torch.zeros(1, device=device), torch.arange(max_len, device=device)[None])
    half = cos.shape[-1] // 2
    return RotaryTable(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
