"""Attached weights: what a persona has beside its mask.

`lora`: low-rank updates of the kept FFN, `W + (alpha / rank) B A` for gate, up and down, under PEFT's names and over
the full intermediate size; what stands at dropped neurons is ignored. `full`: the sub-network's own FFN weights, over
the kept neurons only, ascending.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from masquerade_masks.digests import digest_of_parts
from masquerade_masks.errors import MaskFormatError, MaskShapeError, NonFiniteMask
from masquerade_masks.mask import FFNShape

FORMAT = "masquerade.attached/1"
PARTS = ("gate_proj", "up_proj", "down_proj")
MAX_RANK = 1024

Kind = Literal["lora", "full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Weight = npt.NDArray[Any]  # float16, float32, or uint16: the bits of a bfloat16, which numpy has not
FloatArray = npt.NDArray[np.float32]

_DTYPES = {np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.uint16)}
_LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.([0-9]{1,6})\.mlp\.")


def lora_name(layer: int, part: str, side: Literal["A", "B"]) -> str:
    """PEFT's name of a low-rank factor: A is `[rank, in_features]`, B `[out_features, rank]`."""
    return f"base_model.model.model.layers.{layer}.mlp.{part}.lora_{side}.weight"


def full_name(layer: int, part: str) -> str:
    """gate_proj and up_proj are `[kept, hidden]`, down_proj `[hidden, kept]`."""
    return f"model.layers.{layer}.mlp.{part}.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """Low-rank updates or own weights of all layers; equal where the digests are.

    Tensors are held by reference, as read-only views: of a file they may be mapped memory. The digest covers kind,
    rank, alpha, and every tensor's name, dtype, shape and values, by name.

    Raises `MaskFormatError` (kind, rank, alpha or names), `MaskShapeError` (dtype, number of dimensions) and
    `NonFiniteMask`; `check_fits` tells whether they belong to a mask.
    """

    kind: Kind
    tensors: Mapping[str, Weight]
    alpha: float | None = None  # of lora only, as rank is
    rank: int | None = None
    digest: str = field(init=False)  # sha256, lower-case hex

    def __post_init__(self) -> None:
        _check_numbers(self.kind, self.alpha, self.rank)
        tensors = {name: _checked(name, self.tensors[name]) for name in sorted(self.tensors)}
        object.__setattr__(self, "tensors", MappingProxyType(tensors))
        object.__setattr__(self, "alpha", None if self.alpha is None else float(self.alpha))
        object.__setattr__(self, "digest", digest_of_parts(self._parts()))

    @property
    def scale(self) -> float:
        """What a low-rank product is multiplied by: alpha / rank."""
        assert self.alpha is not None, "of lora only"
        assert self.rank is not None
        return self.alpha / self.rank

    @property
    def num_bytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def float32(self, name: str) -> FloatArray:
        """One tensor's values: a new array."""
        tensor = self.tensors[name]
        if tensor.dtype == np.uint16:
            return (tensor.astype(np.uint32) << 16).view(np.float32)
        return tensor.astype(np.float32)

    def check_fits(self, shape: FFNShape, kept: int) -> None:
        """Raise `MaskFormatError` or `MaskShapeError` unless the tensors are those of the layers, each of its shape."""
        expected = dict(expected_shapes(self.kind, shape, kept, self.rank))
        check_names(self.kind, self.tensors.keys(), expected.keys())
        for name, wanted in expected.items():
            if self.tensors[name].shape != wanted:
                raise MaskShapeError(f"{name} is {list(wanted)} here; this is {list(self.tensors[name].shape)}")

    def _parts(self) -> Iterator[tuple[str, bytes | Weight]]:
        yield "format", FORMAT.encode()
        yield "kind", self.kind.encode()
        if self.rank is not None:
            yield "rank", self.rank.to_bytes(8, "little")
            yield "alpha", np.array(self.alpha, "<f8").tobytes()
        for name, tensor in self.tensors.items():
            yield name, f"{dtype_name(tensor.dtype)}{list(tensor.shape)}".encode()
            yield name, tensor

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Attached) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)


def expected_shapes(kind: Kind, shape: FFNShape, kept: int, rank: int | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every tensor of a kind by name, with its shape."""
    neurons = kept if kind == "full" else shape.intermediate_size
    sizes = dict.fromkeys(PARTS, (neurons, shape.hidden_size)) | {"down_proj": (shape.hidden_size, neurons)}
    for layer in range(shape.num_layers):
        for part, (out_features, in_features) in sizes.items():
            if kind == "full":
                yield full_name(layer, part), (out_features, in_features)
            else:
                assert rank is not None
                yield lora_name(layer, part, "A"), (rank, in_features)
                yield lora_name(layer, part, "B"), (out_features, rank)


def check_names(kind: Kind, found: Any, expected: Any) -> None:
    """Raise `MaskFormatError` where tensors are missing, or there are others."""
    if missing := expected - found:
        raise MaskFormatError(f"the {kind} weights lack {_few(missing)}")
    if unknown := found - expected:
        raise MaskFormatError(f"the {kind} weights hold tensors that this base has no place for: {_few(unknown)}")


def dtype_name(dtype: np.dtype[Any]) -> str:
    """`F16`, `BF16` or `F32`, as safetensors has them."""
    return {2: "BF16" if dtype == np.uint16 else "F16", 4: "F32"}[dtype.itemsize]


def _check_numbers(kind: str, alpha: float | None, rank: int | None) -> None:
    if kind not in KINDS:
        raise MaskFormatError(f"attached weights are {' or '.join(KINDS)}, not {kind!r}")
    if kind == "full":
        if alpha is not None or rank is not None:
            raise MaskFormatError("full weights have neither rank nor alpha")
    elif rank is None or not 1 <= rank <= MAX_RANK:
        raise MaskFormatError(f"the rank of lora is a whole number from 1 to {MAX_RANK}; this is {rank}")
    elif alpha is None or not (math.isfinite(alpha) and alpha > 0):
        raise MaskFormatError(f"the alpha of lora is a finite number above 0; this is {alpha}")


def _checked(name: str, tensor: Weight) -> Weight:
    """A read-only view."""
    if tensor.dtype not in _DTYPES or tensor.ndim != 2:
        raise MaskShapeError(
            f"attached weights are matrices of float16, bfloat16 or float32; {name} is {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if not _is_finite(tensor):
        found = _LAYER.match(name)
        raise NonFiniteMask(name, int(found[1]) if found else 0)
    view = tensor.view()
    view.flags.writeable = False
    return view


def _is_finite(tensor: Weight) -> bool:
    if tensor.dtype == np.uint16:
        return not ((tensor & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(tensor).all())


def _few(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
