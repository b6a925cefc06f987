"""Gathered packs: the FFN rows of a neuron set read straight from the base through an index list, nothing copied.

On CUDA only (and, for tests, on the CPU through triton's interpreter). A kept neuron is one contiguous row in all three
matrices, since down is held transposed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from masquerade_kernels.gathered_blocks import FFNBlocks, choose_blocks
from masquerade_masks import EmptyLayer, MaskIndexError, MaskShapeError, NonFiniteMask, SettingError

if TYPE_CHECKING:
    from masquerade_kernels.packs import FFNWeights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)  # bf16 on tensor cores and asynchronous copies
_INTERPRETER_SMS = 4  # so that tiny shapes are split as large ones are on a GPU


@dataclass(frozen=True, slots=True)
class GatheredLayer:
    """One layer of the base, gate and up stacked and down transposed: contiguous, of one dtype, on one device.

    Raises `MaskShapeError` for tensors that are not so.
    """

    gate_up: torch.Tensor  # [2 intermediate, hidden]: the gates first
    down_t: torch.Tensor  # [intermediate, hidden]

    def __post_init__(self) -> None:
        for name, weight in (("gate_up", self.gate_up), ("down_t", self.down_t)):
            if weight.dtype not in _DTYPES or (weight.dtype, weight.device) != (self.down_t.dtype, self.down_t.device):
                raise MaskShapeError(
                    f"gathered weights are all bfloat16, float16 or float32 on one device; {name} is {weight.dtype} "
                    f"on {weight.device} and down_t {self.down_t.dtype} on {self.down_t.device}"
                )
            if weight.dim() != 2 or not weight.is_contiguous():
                raise MaskShapeError(f"{name} is not a contiguous matrix: a neuron must be one row of memory")
        num_neurons, hidden_size = self.down_t.shape
        if self.gate_up.shape != (2 * num_neurons, hidden_size):
            raise MaskShapeError(
                f"gate_up is [2 intermediate, hidden] and down_t [intermediate, hidden]; these are "
                f"{list(self.gate_up.shape)} and {list(self.down_t.shape)}"
            )

    @property
    def gate(self) -> torch.Tensor:
        """`[intermediate, hidden]`, a view."""
        return self.gate_up[: len(self.down_t)]

    @property
    def up(self) -> torch.Tensor:
        """`[intermediate, hidden]`, a view."""
        return self.gate_up[len(self.down_t) :]


@dataclass(frozen=True, slots=True)
class GatheredWeights:
    """A base's FFN weights on the device, which the dense pack and all gathered packs read."""

    layers: tuple[GatheredLayer, ...]

    @classmethod
    def of(cls, weights: FFNWeights, *, dtype: torch.dtype, device: torch.device) -> GatheredWeights:
        """Copies on `device`, one layer after the other."""
        return cls(
            tuple(
                GatheredLayer(
                    torch.cat([layer.gate.to(device, dtype), layer.up.to(device, dtype)]),
                    layer.down.to(device, dtype).T.contiguous(),
                )
                for layer in weights.layers()
            )
        )


class TransposedLinear:
    """`y = x W`, for a frozen weight that is held `[in_features, out_features]` and shared."""

    def __init__(self, weight_t: torch.Tensor) -> None:
        self.in_features, self.out_features = weight_t.shape
        self.num_bytes = weight_t.nbytes
        self._weight_t = weight_t

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_rows, in_features]` to `[num_rows, out_features]`; `x` has the weight's dtype."""
        return x @ self._weight_t


@dataclass(frozen=True, slots=True)
class GatheredLayerPack:
    """One layer's neuron set U, as rows of the base's weights, and what its members make of it.

    Built by `gathered_layer_pack`, which checks the values; here only shapes are known.
    """

    weights: GatheredLayer
    neurons: torch.Tensor  # int32 [|U|], ascending
    coefficients: torch.Tensor | None = None  # float32 [num_members, |U|], 0 outside a mask; None: all of them 1
    biases: torch.Tensor | None = None  # float32 [num_members, hidden]

    @property
    def num_bytes(self) -> int:
        """What it holds beside the base's weights."""
        tables = (self.neurons, self.coefficients, self.biases)
        return sum(0 if table is None else table.nbytes for table in tables)


def gathered_layer_pack(
    weights: GatheredLayer,
    neurons: npt.NDArray[np.int32],
    coefficients: npt.NDArray[np.float32] | None = None,
    biases: npt.NDArray[np.float32] | None = None,
    *,
    layer: int = 0,
) -> GatheredLayerPack:
    """One layer from host arrays: `neurons` [|U|], `coefficients` [num_members, |U|], `biases` [num_members, hidden].

    The kernels read the rows that `neurons` names without looking, so they are checked here. Raises `EmptyLayer`,
    `MaskShapeError`, `MaskIndexError` (out of range, not ascending) and `NonFiniteMask`.
    """
    intermediate_size, hidden_size = weights.down_t.shape
    _check_neurons(neurons, intermediate_size, layer)
    if coefficients is not None:
        _check_rows("coefficients", coefficients, neurons.size, layer)
    if biases is not None:
        _check_rows("biases", biases, hidden_size, layer)
        if coefficients is not None and len(biases) != len(coefficients):
            raise MaskShapeError(
                f"biases have a row for each of the coefficients': {len(coefficients)}, not {len(biases)}"
            )
    device = weights.down_t.device
    return GatheredLayerPack(
        weights,
        torch.from_numpy(neurons).to(device),
        None if coefficients is None else torch.from_numpy(coefficients).to(device),
        None if biases is None else torch.from_numpy(biases).to(device),
    )


def _check_neurons(neurons: npt.NDArray[np.int32], intermediate_size: int, layer: int) -> None:
    if neurons.ndim != 1 or neurons.dtype != np.int32:
        raise MaskShapeError(f"the neurons of a layer are int32 [|U|]; these are {neurons.dtype} {list(neurons.shape)}")
    if neurons.size == 0:
        raise EmptyLayer(layer)
    if neurons.min() < 0 or neurons.max() >= intermediate_size:
        raise MaskIndexError(
            f"layer {layer} names neurons {neurons.min()} to {neurons.max()}; they are 0 to {intermediate_size - 1}",
            layer,
        )
    if (np.diff(neurons) <= 0).any():
        raise MaskIndexError(f"the neurons of layer {layer} are not ascending, each once", layer)


def _check_rows(name: str, rows: npt.NDArray[np.float32], columns: int, layer: int) -> None:
    if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != columns or len(rows) < 1:
        raise MaskShapeError(f"{name} are float32 [num_rows, {columns}]; these are {rows.dtype} {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise NonFiniteMask(name, layer)


def can_gather(device: torch.device) -> bool:
    """Whether gathered packs run there: a CUDA GPU of compute capability 8.0 or newer, with triton installed.

    The CPU counts while `TRITON_INTERPRET=1` is set, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.version.hip is None and _capability(device) >= _LEAST_CAPABILITY


def gathered_ffn(
    hidden: torch.Tensor,  # [num_tokens, hidden], at least one token
    weights: GatheredLayer,
    neurons: torch.Tensor,  # int32 [|U|], ascending
    coefficients: torch.Tensor | None,  # float32 [num_rows, |U| or intermediate: a column for any neuron]; None: 1
    persona_of_token: torch.Tensor | None,  # int32 or int64 [num_tokens]: rows of both tables; None: there are none
    biases: torch.Tensor | None = None,  # float32 [num_rows, hidden]
    *,
    out: torch.Tensor | None = None,  # [num_tokens, hidden]
    blocks: FFNBlocks | None = None,  # None: the table's
) -> torch.Tensor:
    """One segment's FFN over the rows U, `[num_tokens, hidden]`.

    Nothing waits for the device, so calls can be captured in a CUDA graph. Raises `SettingError` where gathered packs
    do not run.
    """
    kernels = _kernels(hidden.device)
    assert hidden.dtype == weights.down_t.dtype, f"weights of {weights.down_t.dtype} were given {hidden.dtype}"
    assert hidden.is_contiguous(), "kernels read whole rows"
    assert hidden.shape[1] == weights.down_t.shape[1], "rows are of the hidden size"
    (num_tokens, hidden_size), num_neurons = hidden.shape, len(neurons)
    if coefficients is not None:
        _check_table(coefficients, (num_neurons, len(weights.down_t)), persona_of_token, num_tokens)
    if biases is not None:
        _check_table(biases, (hidden_size,), persona_of_token, num_tokens)
    if out is None:
        out = torch.empty_like(hidden)
    if blocks is None:
        blocks = choose_blocks(
            num_tokens,
            num_neurons,
            hidden_size,
            itemsize=hidden.dtype.itemsize,
            num_sms=num_multiprocessors(hidden.device),
        )
    # Triton launches on the thread's current device, whatever it is given.
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
        kernels.launch(
            hidden,
            weights.gate,
            weights.up,
            weights.down_t,
            neurons,
            coefficients,
            persona_of_token,
            biases,
            out,
            blocks,
        )
    return out


def _check_table(
    table: torch.Tensor, columns: tuple[int, ...], persona_of_token: torch.Tensor | None, num_tokens: int
) -> None:
    assert table.dtype == torch.float32, "coefficients and biases are float32"
    assert table.is_contiguous(), "a persona is a row"
    assert table.shape[1] in columns, "coefficients over U or over every neuron, biases over the hidden size"
    assert persona_of_token is not None, "coefficients and biases are read by persona"
    assert persona_of_token.shape == (num_tokens,), "one persona a token"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; a small number on the CPU's interpreter."""
    if device.type == "cpu":
        return _INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@functools.cache
def _kernels(device: torch.device) -> ModuleType:
    if not can_gather(device):
        raise SettingError(
            "device",
            f"gathered packs need triton and a CUDA GPU of compute capability 8.0 or newer, and {device} is none",
        )
    return importlib.import_module("masquerade_kernels.gathered_ffn")
