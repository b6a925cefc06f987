"""Linear layers with weights laid out once for the device."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

# oneDNN chooses the layout for this many rows. Hints of 16 to 64 gave the same layout on AVX512-BF16 (one
# thread, 3072x576: 0.23 ms at 16 rows, 0.61 at 64); without a hint it packs for one row and is slower from 8 up.
_ROW_HINT = 32


class PackedLinear(nn.Module):
    """`y = x Wᵀ + b` for frozen weights.

    bf16 on a CPU with oneDNN keeps the weight in oneDNN's own layout (1.2 to 1.9 times as fast as `F.linear`);
    everything else runs `F.linear`. The ops are torch's private API, so their absence is no error.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` is `[out_features, in_features]`, `bias` `[out_features]`; neither is kept by reference."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.packed = _can_pack(weight.device.type, weight.dtype)
        weight = weight.detach()
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROW_HINT)
            if self.packed
            else weight.contiguous()
        )
        self._bias = None if bias is None else bias.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; `x` has the weight's dtype."""
        assert x.dtype == self.dtype, f"a {self.dtype} linear was given {x.dtype}"
        if self.packed:
            output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return output
        return F.linear(x, self._weight, self._bias)


@functools.cache
def _can_pack(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cpu" or dtype != torch.bfloat16:
        return False
    ops = torch.ops.mkldnn  # empty in a torch built without oneDNN
    known = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return known and bool(ops._is_mkldnn_bf16_supported())
