"""The oracle of every persona FFN: eager, float64, one coefficient row per token."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from masquerade_kernels.lora import LoraFactors


def persona_ffn_reference(
    hidden: torch.Tensor,  # [num_tokens, hidden]
    gate: torch.Tensor,  # [intermediate, hidden]
    up: torch.Tensor,  # [intermediate, hidden]
    down: torch.Tensor,  # [hidden, intermediate]
    coefficients: torch.Tensor | None = None,  # [num_tokens or 1, intermediate]; None: the base
    bias: torch.Tensor | None = None,  # [num_tokens or 1, hidden]
    lora: LoraFactors | None = None,  # of every token
) -> torch.Tensor:
    """`(silu(x W_gateᵀ) ⊙ (x W_upᵀ) ⊙ c) W_downᵀ + b`, float64 `[num_tokens, hidden]`.

    With low-rank updates each W is `W + scale B A`.
    """
    if lora is not None:
        gate, up, down = (
            weight.double() + lora.scale * (b.double() @ a.double())
            for weight, (a, b) in ((gate, lora.gate), (up, lora.up), (down, lora.down))
        )
    x = hidden.double()
    activations = F.silu(x @ gate.double().T) * (x @ up.double().T)
    if coefficients is not None:
        activations = activations * coefficients.double()
    output = activations @ down.double().T
    return output if bias is None else output + bias.double()
