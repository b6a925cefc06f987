"""Linear layers with weights laid out once for the device, in the model's dtype or in int8."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

# oneDNN chooses the layout for this many rows. Hints of 16 to 64 gave the same layout on AVX512-BF16 (one
# thread, 3072x576: 0.23 ms at 16 rows, 0.61 at 64); without a hint it packs for one row and is slower from 8 up.
_ROW_HINT = 32
# oneDNN compiles a kernel for every pair of weight shape and number of rows, which takes 0.5 to 1 ms and 0.5 MB.
# It keeps 1,024; a busy world wanted more (600 MB, and memory in splinters). So beyond the numbers that decoding stays
# at, rows are counted in these steps; what is missing is padding.
_EXACT_ROWS = 16
_ROW_STEPS = ((64, 8), (256, 16), (1 << 62, 32))  # up to so many rows, in multiples of
_ZERO_POINT = 128  # of int8 activations: oneDNN's fast kernels take them unsigned


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
        """`[num_rows, in_features]` to `[num_rows, out_features]`; `x` has the weight's dtype."""
        assert x.dtype == self.dtype, f"a {self.dtype} linear was given {x.dtype}"
        if self.packed:
            # The overload by name: choosing one takes 3 us of a call's 18.
            linear = torch.ops.mkldnn._linear_pointwise.default
            output: torch.Tensor = linear(_padded(x), self._weight, self._bias, "none", [], "")
            return output[: len(x)]
        return F.linear(x, self._weight, self._bias)


class DotLinear(nn.Module):
    """`y = x Wᵀ + b` for frozen bf16 weights on CPUs with bf16 dot products (`can_dot`).

    A row comes out the same to the bit whatever rows are beside it. Against oneDNN's layout (two threads of an
    AVX512-BF16 machine): 0.6 to 0.7 times the time up to 32 rows, the same at 128, 1.1 times at 512
    (benchmarks/linears.py).
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, products: torch.dtype | None = None
    ) -> None:
        """`weight` is `[out_features, in_features]`, `bias` `[out_features]`; neither is kept by reference.

        `products` are of bf16 or of float32, to which both sides are widened as they are read; by default of what this
        CPU multiplies faster.
        """
        from masquerade_kernels.cpu_dots import multiplies_float32_faster  # noqa: PLC0415  (numba: a second of import)
        from masquerade_kernels.cpu_linear import gated_loop, in_blocks, linear_loop  # noqa: PLC0415

        super().__init__()
        self._wide = multiplies_float32_faster() if products is None else products is torch.float32
        self._loop_for, self._gated_loop_for = linear_loop, gated_loop
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._weight = in_blocks(weight.detach())
        self._bias = None if bias is None else bias.detach().float()
        self.num_bytes = self._weight.nbytes + (0 if bias is None else bias.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_rows, in_features]` to `[num_rows, out_features]`; `x` has the weight's dtype."""
        assert x.dtype == self.dtype, f"a {self.dtype} linear was given {x.dtype}"
        num_rows = x.shape[0]
        output = x.new_empty(num_rows, self.out_features)
        x = self._multiplied(x)
        loop = self._loop_for(torch.get_num_threads())  # of the thread that calls, not of the one that packed
        loop(
            num_rows * self.in_features * self.out_features,
            num_rows,
            int(self._wide),
            self.in_features // 2,
            self.out_features,
            x.data_ptr(),
            self._weight.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            output.data_ptr(),
        )
        return output

    @property
    def can_gate(self) -> bool:
        """Whether `gated` runs: the gates fill whole vectors, and nothing is added to them."""
        return self.out_features % 32 == 0 and self._bias is None

    def gated(self, x: torch.Tensor, coefficients: torch.Tensor | None, personas: torch.Tensor | None) -> torch.Tensor:
        """`silu(gate) * up * coefficient`, `[num_rows, num_neurons]`, where the outputs are gates and then ups.

        Arguments as at `RowOps.swiglu`, which this is in one pass with the products, rounded once.
        """
        assert x.dtype == self.dtype, f"a {self.dtype} linear was given {x.dtype}"
        num_rows, num_neurons = x.shape[0], self.out_features // 2
        output = x.new_empty(num_rows, num_neurons)
        x = self._multiplied(x)
        scales = (0, 0)
        if coefficients is not None and personas is not None:
            scales = (coefficients.data_ptr(), personas.data_ptr())
        loop = self._gated_loop_for(torch.get_num_threads())
        loop(
            num_rows * self.in_features * self.out_features,
            num_rows,
            int(self._wide),
            self.in_features // 2,
            num_neurons,
            x.data_ptr(),
            self._weight.data_ptr(),
            *scales,
            output.data_ptr(),
        )
        return output

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """The rows as the loops take them."""
        return x.float().contiguous() if self._wide else x.contiguous()


class Int8Linear(nn.Module):
    """`y = x Wᵀ + b` with int8 weights, one scale an output, and int8 products. CPU with oneDNN only.

    A row of activations becomes two of int8, the second the 254th part of the first's rounding: 15 bits together. With
    one row alone, outliers of 20 deviations leave the rest 6 bits, and KL to bf16 is 0.7 nats; the weights are read
    once either way. Scales depend on a row alone, so neighbours in a batch change nothing.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` is `[out_features, in_features]` in bf16 or float32, `bias` `[out_features]`."""
        from masquerade_kernels.cpu_int8 import int8_loops  # noqa: PLC0415  (numba: a second of import)

        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        quantised = (weight.float() / scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, [_ROW_HINT, self.in_features])
        self._scales = scales
        self._zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._bias = None if bias is None else bias.detach().float()
        self.num_bytes = quantised.nbytes + scales.nbytes + (0 if bias is None else bias.nbytes)
        self._loops = int8_loops(8 * self.dtype.itemsize, torch.get_num_threads())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_rows, in_features]`, contiguous, to `[num_rows, out_features]`, both in the weight's dtype."""
        assert x.dtype == self.dtype, f"a {self.dtype} linear was given {x.dtype}"
        num_rows = x.shape[0]
        quantised = torch.empty(2 * num_rows, self.in_features, dtype=torch.uint8)
        scales = torch.empty(num_rows)
        self._loops.quantise(num_rows, self.in_features, x.data_ptr(), quantised.data_ptr(), scales.data_ptr())
        products: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            _padded(quantised), 1.0, _ZERO_POINT, self._weight, self._scales, self._zero_points, None,
            1.0, 0, self.dtype, "none", [], "",
        )  # fmt: skip
        output = x.new_empty(num_rows, self.out_features)
        bias_at = 0 if self._bias is None else self._bias.data_ptr()
        self._loops.rescale(
            num_rows, self.out_features, products.data_ptr(), scales.data_ptr(), bias_at, output.data_ptr()
        )
        return output


Linear = DotLinear | PackedLinear | Int8Linear


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False) -> Linear:
    """`weight` `[out_features, in_features]` and `bias` `[out_features]`, laid out for the weight's device."""
    if int8:
        return Int8Linear(weight, bias)
    return DotLinear(weight, bias) if can_dot(weight) else PackedLinear(weight, bias)


def can_dot(weight: torch.Tensor) -> bool:
    """Whether `DotLinear` takes this weight here."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
        return False
    from masquerade_kernels.cpu_dots import has_dot_products  # noqa: PLC0415  (numba: a second of import)

    return has_dot_products()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """`x` `[num_rows, in_features]` with rows of zeros up to the next number of rows that kernels are compiled for."""
    extra = padded_rows(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, extra)) if extra else x


def padded_rows(num_rows: int) -> int:
    """How many rows are computed for so many."""
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = next(step for most, step in _ROW_STEPS if num_rows <= most)
    return -(-num_rows // step) * step


@functools.cache
def can_run_int8(device_type: str) -> bool:
    """Whether `Int8Linear` runs here."""
    ops = torch.ops.onednn  # empty in a torch built without oneDNN
    return device_type == "cpu" and hasattr(ops, "qlinear_prepack") and hasattr(ops, "qlinear_pointwise")


@functools.cache
def _can_pack(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cpu" or dtype != torch.bfloat16:
        return False
    ops = torch.ops.mkldnn  # empty in a torch built without oneDNN
    known = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return known and bool(ops._is_mkldnn_bf16_supported())
