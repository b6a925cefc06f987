"""What happens to a step's rows between linear layers: the residual's norms, and the persona FFN's activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm."""

    weight: torch.Tensor  # [hidden]
    eps: float


class RowOps(Protocol):
    """Every tensor is contiguous; rows are `[num_rows, hidden]` in the model's dtype."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`x / rms(x) * weight`."""
        ...

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor:
        """The norm of `x + delta`, which `x` becomes."""
        ...

    def swiglu(
        self,
        gate_up: torch.Tensor,  # [num_rows, 2 num_neurons]: the gates first
        coefficients: torch.Tensor | None,  # float32 [num_personas, num_neurons]; None: all of them 1
        personas: torch.Tensor | None,  # int64 [num_rows]: each row's row of `coefficients`
    ) -> torch.Tensor:
        """`silu(gate) * up * coefficient`, `[num_rows, num_neurons]`, the product taken in float32."""
        ...


class TorchRows:
    """Plain torch, for any device."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.eps).to(x.dtype)

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self.norm(x.add_(delta), norm)

    def swiglu(
        self, gate_up: torch.Tensor, coefficients: torch.Tensor | None, personas: torch.Tensor | None
    ) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if coefficients is None or personas is None:
            return F.silu(gate).mul_(up)
        # In place, the product of bf16 and float32 is taken in float32 and rounded once.
        return F.silu(gate).mul_(up).mul_(coefficients.index_select(0, personas))


class CompiledRows:
    """One compiled loop each, for bf16 and float32 on the CPU."""

    def __init__(self, dtype: torch.dtype, num_threads: int) -> None:
        from masquerade_kernels.cpu_rows import row_loops  # noqa: PLC0415  (numba: a second of import that CUDA needs not)

        self._loops = row_loops(8 * dtype.itemsize, num_threads)

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        out = torch.empty_like(x)
        self._loops.norm(*x.shape, x.data_ptr(), norm.weight.data_ptr(), norm.eps, out.data_ptr())
        return out

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor:
        out = torch.empty_like(x)
        self._loops.add_norm(*x.shape, x.data_ptr(), delta.data_ptr(), norm.weight.data_ptr(), norm.eps, out.data_ptr())
        return out

    def swiglu(
        self, gate_up: torch.Tensor, coefficients: torch.Tensor | None, personas: torch.Tensor | None
    ) -> torch.Tensor:
        num_rows, num_neurons = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, num_neurons)
        if coefficients is None or personas is None:
            table, num_personas, rows = 0, 0, 0
        else:
            table, num_personas, rows = coefficients.data_ptr(), coefficients.shape[0], personas.data_ptr()
        self._loops.swiglu(num_rows, num_neurons, gate_up.data_ptr(), table, num_personas, rows, out.data_ptr())
        return out


def row_ops(device: torch.device, dtype: torch.dtype) -> RowOps:
    """The fastest for a device."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        return CompiledRows(dtype, torch.get_num_threads())
    return TorchRows()
