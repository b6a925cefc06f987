"""The seams in transformers' modelling code: attention and the FFN read the forward context.

The attention function is registered under a name that is *not* in transformers' mask registry, so the model builds
no mask and hands attention `attention_mask=None` (checked in transformers 5.23).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from masquerade_engine.context import active_context

ATTENTION_NAME = "masquerade"


def _context_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **_ignored: Any,  # dropout and position_ids: serving and frozen weights use neither
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None, "no mask function is registered for this attention"
    layer = module.layer_idx
    assert isinstance(layer, int)
    return (
        active_context().attend(layer, query, key, value, scaling=scaling, sliding_window=sliding_window),
        None,
    )


AttentionInterface.register(ATTENTION_NAME, _context_attention)


class PersonaFFN(nn.Module):
    """A gate/up/down FFN whose forward pass the context decides.

    Parameter names stay those of the stock MLP, so state dicts load and save unchanged.
    """

    def __init__(self, layer: int, mlp: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gate_proj = mlp.get_submodule("gate_proj")
        self.up_proj = mlp.get_submodule("up_proj")
        self.down_proj = mlp.get_submodule("down_proj")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return active_context().ffn(self, hidden)


class RMSNorm(nn.Module):
    """A family's RMS norm, which the context computes; its weight keeps its name."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.weight = plain.get_parameter("weight")
        self.variance_epsilon: float = getattr(plain, "variance_epsilon")  # noqa: B009

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return active_context().norm(self, hidden)


def install_seams(model: nn.Module) -> nn.Module:
    """Replace every decoder layer's MLP by a `PersonaFFN`, and every norm by an `RMSNorm`."""
    for layer, block in enumerate(decoder_layers(model)):
        block.mlp = PersonaFFN(layer, block.get_submodule("mlp"))
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "variance_epsilon")}
    for name, plain_norm in norms.items():
        _replace(model, name, RMSNorm(plain_norm))
    return model


def _replace(model: nn.Module, name: str, instead: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, instead)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model of a supported family."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def persona_ffns(model: nn.Module) -> list[PersonaFFN]:
    """The FFN seams in layer order."""
    ffns = [block.get_submodule("mlp") for block in decoder_layers(model)]
    return [ffn for ffn in ffns if isinstance(ffn, PersonaFFN)]
