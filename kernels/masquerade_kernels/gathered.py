"""Gathered packs: the FFN rows of a neuron set read straight from the base through an index list, nothing copied.

On CUDA only (and, for tests, on the CPU through triton's interpreter). A kept neuron is one contiguous row in all three
matrices, since down is held transposed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from masquerade_kernels.gathered_blocks import FFNBlocks, choose_blocks
from masquerade_kernels.packs import FFNWeights
from masquerade_masks import (
    EmptyLayer,
    FFNShape,
    MaskFormatError,
    MaskIndexError,
    MaskShapeError,
    NonFiniteMask,
    SettingError,
    SubNetwork,
)

BASE_ROW = 0

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)  # bf16 on tensor cores and asynchronous copies
_INTERPRETER_SMS = 4  # so that tiny shapes are split as large ones are on a GPU


@dataclass(frozen=True, slots=True)
class GatheredLayer:
    """One layer of the base with down transposed: contiguous, of one dtype, on one device.

    Gate and up may be views of one stacked matrix. Raises `MaskShapeError` for tensors that are not so.
    """

    gate: torch.Tensor  # [intermediate, hidden]
    up: torch.Tensor  # [intermediate, hidden]
    down_t: torch.Tensor  # [intermediate, hidden]

    def __post_init__(self) -> None:
        for name, weight in (("gate", self.gate), ("up", self.up), ("down_t", self.down_t)):
            if weight.dim() != 2 or weight.shape != self.gate.shape:
                raise MaskShapeError(
                    f"{name} is [intermediate, hidden] like gate, {list(self.gate.shape)}; this is {list(weight.shape)}"
                )
            if weight.dtype not in _DTYPES or (weight.dtype, weight.device) != (self.gate.dtype, self.gate.device):
                raise MaskShapeError(
                    f"gathered weights are all bfloat16, float16 or float32 on one device; {name} is {weight.dtype} "
                    f"on {weight.device} and gate {self.gate.dtype} on {self.gate.device}"
                )
            if not weight.is_contiguous():
                raise MaskShapeError(f"{name} is not contiguous: a neuron must be one row of memory")


@dataclass(frozen=True, slots=True)
class GatheredWeights:
    """A base's FFN weights as gathered packs read them, shared by all packs."""

    layers: tuple[GatheredLayer, ...]

    @classmethod
    def of(cls, weights: FFNWeights, *, dtype: torch.dtype, device: torch.device) -> GatheredWeights:
        """Copies on `device`, of down transposed; gate and up are taken as they are where they fit."""
        return cls(
            tuple(
                GatheredLayer(
                    layer.gate.to(device, dtype).contiguous(),
                    layer.up.to(device, dtype).contiguous(),
                    layer.down.to(device, dtype).T.contiguous(),
                )
                for layer in weights.layers()
            )
        )

    @property
    def shape(self) -> FFNShape:
        intermediate_size, hidden_size = self.layers[0].gate.shape
        return FFNShape(len(self.layers), intermediate_size, hidden_size)


@dataclass(frozen=True, slots=True)
class GatheredLayerPack:
    """One layer's neuron set U and what its members make of it.

    Built by `gathered_layer_pack`, which checks the values; here only shapes are known.
    """

    neurons: torch.Tensor  # int32 [|U|], ascending
    coefficients: torch.Tensor  # float32 [num_rows, |U|]: row 0 ones, 0 outside a persona's mask
    biases: torch.Tensor | None = None  # float32 [num_rows, hidden]


@dataclass(frozen=True, slots=True)
class GatheredPack:
    """All layers over one set of personas; U may be of another size in each."""

    layers: tuple[GatheredLayerPack, ...]
    row_of: Mapping[str | None, int]  # digest to row of the coefficients; None, the base, where U is every neuron

    @property
    def num_bytes(self) -> int:
        """What the pack holds beside the base's weights."""
        return sum(
            layer.neurons.nbytes + layer.coefficients.nbytes + (0 if layer.biases is None else layer.biases.nbytes)
            for layer in self.layers
        )


@dataclass(frozen=True, slots=True)
class GatheredSegment:
    """Consecutive rows of a step and the pack they run on; may be empty."""

    start: int
    stop: int
    pack: GatheredPack
    persona_of_token: torch.Tensor  # int32 or int64 [stop - start]: rows of the pack's coefficients


def gathered_pack(subnetworks: Sequence[SubNetwork], *, device: torch.device, with_base: bool = False) -> GatheredPack:
    """The union of these personas' masks, layer by layer; every neuron if the base is a member too.

    Raises `MaskShapeError` for personas of different shapes or none at all.
    """
    if not subnetworks:
        raise MaskShapeError("a gathered pack has at least one persona")
    shape = subnetworks[0].shape
    if any(subnetwork.shape != shape for subnetwork in subnetworks):
        raise MaskShapeError(f"the personas of a gathered pack are of one base; the first is of {shape}")
    if any(subnetwork.attached for subnetwork in subnetworks):
        raise MaskFormatError("a gathered pack reads the base's own rows, and holds no attached weights")
    members = {subnetwork.digest: subnetwork for subnetwork in subnetworks}
    rows: dict[str | None, int] = {digest: row for row, digest in enumerate(members, start=1)}
    if with_base:
        rows[None] = BASE_ROW
    layers = _layer_packs(list(members.values()), shape, device, with_base)
    return GatheredPack(tuple(layers), rows)


def _layer_packs(
    members: list[SubNetwork], shape: FFNShape, device: torch.device, with_base: bool
) -> Iterator[GatheredLayerPack]:
    coefficients = [member.coefficients() for member in members]  # each float32 [num_layers, intermediate]
    kept = [member.mask.to_dense() for member in members]
    biases = _bias_rows(members, shape)
    for layer in range(shape.num_layers):
        used = np.logical_or.reduce([dense[layer] for dense in kept]) | with_base
        neurons = np.flatnonzero(used).astype(np.int32)
        rows = np.stack([np.ones(neurons.size, np.float32), *(table[layer, neurons] for table in coefficients)])
        yield gathered_layer_pack(
            neurons, rows, None if biases is None else biases[layer], shape=shape, layer=layer, device=device
        )


def _bias_rows(members: list[SubNetwork], shape: FFNShape) -> npt.NDArray[np.float32] | None:
    """Float32 `[num_layers, num_rows, hidden]`, zero where a member has none; None where no member has any."""
    if all(member.bias is None for member in members):
        return None
    rows = np.zeros((shape.num_layers, len(members) + 1, shape.hidden_size), dtype=np.float32)
    for row, member in enumerate(members, start=1):
        biases = member.biases()
        if biases is not None:
            rows[:, row] = biases
    return rows


def gathered_layer_pack(
    neurons: npt.NDArray[np.int32],
    coefficients: npt.NDArray[np.float32],
    biases: npt.NDArray[np.float32] | None = None,
    *,
    shape: FFNShape,
    device: torch.device,
    layer: int = 0,
) -> GatheredLayerPack:
    """One layer from host arrays: `neurons` [|U|], `coefficients` [num_rows, |U|], `biases` [num_rows, hidden].

    The kernels read the rows that `neurons` names without looking, so they are checked here. Raises `EmptyLayer`,
    `MaskShapeError`, `MaskIndexError` (out of range, not ascending) and `NonFiniteMask`.
    """
    _check_neurons(neurons, shape.intermediate_size, layer)
    _check_rows("coefficients", coefficients, neurons.size, layer)
    if biases is not None:
        _check_rows("biases", biases, shape.hidden_size, layer)
        if len(biases) != len(coefficients):
            raise MaskShapeError(
                f"biases have a row for each of the coefficients': {len(coefficients)}, not {len(biases)}"
            )
    return GatheredLayerPack(
        torch.from_numpy(neurons).to(device),
        torch.from_numpy(coefficients).to(device),
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


def is_available(device: torch.device) -> bool:
    """Whether gathered packs run there: a CUDA GPU of compute capability 8.0 or newer, with triton installed.

    The CPU counts while `TRITON_INTERPRET=1` is set, for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.version.hip is None and _capability(device) >= _LEAST_CAPABILITY


def run_gathered_ffn(
    hidden: torch.Tensor,  # [num_tokens, hidden], in the weights' dtype
    layer: int,
    segments: Sequence[GatheredSegment],  # cover all rows, in order
    weights: GatheredWeights,
) -> torch.Tensor:
    """`[num_tokens, hidden]`: every row through its segment's pack under its own persona's coefficients.

    One launch of each kernel a segment: one union of all personas reads fewer bytes than a pack each, so a step has
    few segments. Nothing waits for the device, so calls can be captured in a CUDA graph. Raises `SettingError` where
    gathered packs do not run.
    """
    base = weights.layers[layer]
    assert hidden.dtype == base.gate.dtype, f"weights of {base.gate.dtype} were given {hidden.dtype}"
    assert hidden.is_contiguous(), "kernels read whole rows"
    assert hidden.shape[1] == base.gate.shape[1], "rows are of the hidden size"
    out = torch.empty_like(hidden)
    done = 0
    for segment in segments:
        assert segment.start == done, "segments cover the rows in order"
        done = segment.stop
        if segment.start < segment.stop:
            rows = slice(segment.start, segment.stop)
            _run_segment(hidden[rows], base, segment.pack.layers[layer], segment.persona_of_token, out[rows])
    assert done == len(hidden), "segments cover all rows"
    return out


def _run_segment(
    hidden: torch.Tensor,
    base: GatheredLayer,
    pack: GatheredLayerPack,
    persona_of_token: torch.Tensor,
    out: torch.Tensor,
) -> None:
    gathered_ffn(hidden, base, pack.neurons, pack.coefficients, persona_of_token, pack.biases, out=out)


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
    """One segment's FFN over the rows U. Raises `SettingError` where gathered packs do not run."""
    kernels = _kernels(hidden.device)
    (num_tokens, hidden_size), num_neurons = hidden.shape, len(neurons)
    if coefficients is not None:
        _check_table(coefficients, (num_neurons, len(weights.gate)), persona_of_token, num_tokens)
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
    if not is_available(device):
        raise SettingError(
            "device",
            f"gathered packs need triton and a CUDA GPU of compute capability 8.0 or newer, and {device} is none",
        )
    return importlib.import_module("masquerade_kernels.gathered_ffn")
