"""Keep-index files: a mask as integers `[layers, kept]`, in torch's `.pt` or as `.json`.

The form the paper's public code exchanges. It carries no gains, no biases and no base: an import is told its
base, and an export of a sub-network with gains keeps only its mask.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from masquerade_masks.durable import write_atomic
from masquerade_masks.errors import MaskFormatError, MaskIndexError, MaskShapeError
from masquerade_masks.mask import FFNShape, Mask
from masquerade_masks.subnetwork import SubNetwork

SUFFIXES = (".pt", ".json")


def import_keep_index(
    path_or_bytes: Path | bytes, suffix: str | None = None, *, base: str, shape: FFNShape
) -> SubNetwork:
    """The sub-network of a keep-index file on the base with this fingerprint and shape.

    `suffix` is `.pt` or `.json`; a path's own where it is None. Within a layer, indices may stand in any
    order. Raises `MaskFormatError` (neither form, damaged, not integers), `MaskShapeError` (another number of
    layers, ragged), `MaskIndexError` (out of range, twice in a layer), `EmptyLayer`; `OSError` for a path
    that cannot be read.
    """
    if suffix is None and isinstance(path_or_bytes, Path):
        suffix = path_or_bytes.suffix
    data = path_or_bytes.read_bytes() if isinstance(path_or_bytes, Path) else path_or_bytes
    if suffix not in SUFFIXES:
        raise _unknown_suffix(suffix)
    indices = _parse_pt(data) if suffix == ".pt" else _parse_json(data)
    if indices.shape[0] != shape.num_layers:
        raise MaskShapeError(f"the keep-index has {indices.shape[0]} layers, and the base {shape}")
    if indices.shape[1] > shape.intermediate_size:
        raise MaskShapeError(f"the keep-index keeps {indices.shape[1]} neurons a layer, and the base has {shape}")
    return SubNetwork(base, shape, Mask.from_kept_indices(indices, shape.intermediate_size))


def export_keep_index(subnetwork: SubNetwork, path: Path) -> None:
    """Write the kept indices, ascending, as int64 `.pt` or as `.json`, by the path's suffix.

    Raises `MaskFormatError` for another suffix and `StorageFull`.
    """
    indices = subnetwork.mask.kept_indices()
    if path.suffix == ".pt":
        write_atomic(path, _torch_bytes(indices))
    elif path.suffix == ".json":
        write_atomic(path, (json.dumps(indices.tolist(), separators=(",", ":")) + "\n").encode())
    else:
        raise _unknown_suffix(path.suffix)


def _unknown_suffix(suffix: str | None) -> MaskFormatError:
    return MaskFormatError(f"{suffix!r} is no keep-index form; there are {' and '.join(SUFFIXES)}")


def _parse_json(data: bytes) -> npt.NDArray[np.int64]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MaskFormatError(f"the keep-index is not JSON, or truncated: {error}") from error
    return _matrix(rows)


def _parse_pt(data: bytes) -> npt.NDArray[np.int64]:
    """A tensor `[layers, kept]`, or a list of one tensor a layer."""
    import torch  # noqa: PLC0415  (seconds of import, for this one form)

    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged and for refused content
        reason = str(error).partition("\n")[0]
        raise MaskFormatError(f"the keep-index is not a torch file of plain tensors: {reason}") from error
    rows = loaded if isinstance(loaded, list | tuple) else [loaded]
    for tensor in rows:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise MaskFormatError("the keep-index .pt holds no plain integer tensor [layers, kept]")
        if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise MaskFormatError(f"kept indices are integers; these are {tensor.dtype}")
        if tensor.numel() > len(data):  # a view of a few bytes may claim any size
            raise MaskShapeError(f"the keep-index claims {tensor.numel()} indices in {len(data)} bytes")
    if isinstance(loaded, torch.Tensor):
        return _two_dimensional(loaded.numpy())
    return _matrix([tensor.tolist() for tensor in rows])


def _matrix(rows: Any) -> npt.NDArray[np.int64]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise MaskFormatError("a keep-index is a list of one list of integers a layer")
    for layer, row in enumerate(rows):
        if not all(type(index) is int for index in row):
            raise MaskFormatError(f"a keep-index holds integers only; layer {layer} does not")
        if len(row) != len(rows[0]):
            raise MaskShapeError(
                f"the keep-index is ragged: layer 0 keeps {len(rows[0])} neurons, layer {layer} {len(row)}"
            )
        if any(not -(1 << 63) <= index < 1 << 63 for index in row):
            raise MaskIndexError(f"layer {layer} keeps a neuron whose index does not fit 64 bits", layer)
    return _two_dimensional(np.array(rows, dtype=np.int64))


def _two_dimensional(indices: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if indices.ndim != 2:
        raise MaskShapeError(f"a keep-index is [layers, kept]; this is of shape {list(indices.shape)}")
    return indices


def _torch_bytes(indices: npt.NDArray[np.int32]) -> bytes:
    import torch  # noqa: PLC0415

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(indices.astype(np.int64)), buffer)
    return buffer.getvalue()
