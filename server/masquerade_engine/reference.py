"""The oracle of every faster path: plain causal attention over whole sequences and a masked dense FFN.

Slow on purpose and free of state: each call sees `[batch, tokens]` from position 0, all rows of equal length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from masquerade_engine.context import forward_context
from masquerade_engine.seams import PersonaFFN, RMSNorm
from masquerade_kernels.lora import LoraFactors


class ReferenceContext:
    """Causal attention, and one persona's `coefficients` `[layers, intermediate]` (None: the base) in every row."""

    def __init__(
        self,
        coefficients: torch.Tensor | None = None,
        biases: torch.Tensor | None = None,
        lora: Sequence[LoraFactors] | None = None,  # by layer
    ) -> None:
        self._coefficients = coefficients
        self._biases = biases  # [layers, hidden]
        self._lora = lora

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
        num_tokens = query.shape[2]
        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril()
        if sliding_window is not None:
            visible = visible.triu(1 - sliding_window)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2)

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(hidden), module.up_proj(hidden)
        lora = None if self._lora is None else self._lora[module.layer]
        if lora is not None:
            gate, up = gate + _update(hidden, lora.gate, lora.scale), up + _update(hidden, lora.up, lora.scale)
        activations = F.silu(gate) * up
        if self._coefficients is not None:
            scale = self._coefficients[module.layer]
            activations = (activations.to(scale.dtype) * scale).to(hidden.dtype)
        output: torch.Tensor = module.down_proj(activations)
        if lora is not None:
            output = output + _update(activations, lora.down, lora.scale)
        if self._biases is not None:
            output = output + self._biases[module.layer].to(output.dtype)
        return output

    def norm(self, module: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * scaled.to(hidden.dtype)


def _update(x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], scale: float) -> torch.Tensor:
    """`scale (x Aᵀ) Bᵀ`."""
    a, b = (factor.to(x.device, x.dtype) for factor in factors)
    return scale * (x @ a.T) @ b.T


@torch.no_grad()
def reference_logits(
    model: torch.nn.Module,
    token_ids: torch.Tensor,  # [batch, tokens]
    coefficients: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    lora: Sequence[LoraFactors] | None = None,
) -> torch.Tensor:
    """Logits `[batch, tokens, vocab]` of a model with seams under one persona's coefficients."""
    with forward_context(ReferenceContext(coefficients, biases, lora)):
        logits: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits
