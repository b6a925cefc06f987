"""The safetensors container in canonical form: the same content is always the same bytes.

The `safetensors` package orders metadata by a random hash and would give other bytes on every call. What is
written here is a plain safetensors file that the package reads; what is read here may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from masquerade_masks.errors import MaskFormatError

Tensors = dict[str, npt.NDArray[Any]]

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "F16": np.dtype("<f2")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 16 << 20  # bytes; the settings of a sculpt are a few KiB


def pack(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Uint8 and float16 tensors, widest dtype first and then by name, under metadata sorted by key.

    The header is padded with spaces to 8 bytes, as the safetensors package does, so tensors lie aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    body = bytearray()
    for name, tensor in ordered:
        stored = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
        offsets = [len(body), len(body) + stored.nbytes]
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": offsets}
        body += stored.tobytes()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def unpack(data: bytes) -> tuple[Tensors, dict[str, str]]:
    """Read-only tensors by name, and the metadata.

    Raises `MaskFormatError` for what is not a whole safetensors file of uint8 and float16 tensors: truncated,
    a damaged header, a key given twice, tensors that overlap, leave gaps or end elsewhere than the file.
    """
    header, body = _split(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MaskFormatError("not a mask file: the safetensors metadata are not strings")
    places = sorted(((name, *_place(name, entry)) for name, entry in header.items()), key=lambda at: at[3:])
    tensors: Tensors = {}
    expected_start = 0
    for name, dtype, shape, start, end in places:
        if start != expected_start:
            raise MaskFormatError(f"damaged: tensor {name!r} begins at byte {start}, not {expected_start}")
        if end > len(body):
            raise MaskFormatError(f"truncated: tensor {name!r} ends at byte {end}, the data at {len(body)}")
        tensors[name] = np.frombuffer(body[start:end], dtype=dtype).reshape(shape)
        expected_start = end
    if expected_start != len(body):
        raise MaskFormatError(f"damaged: {len(body) - expected_start} bytes follow the last tensor")
    return tensors, metadata


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < 8:
        raise MaskFormatError(f"not a mask file: {len(data)} bytes are too few for a safetensors header")
    size = int.from_bytes(data[:8], "little")
    if size > _MAX_HEADER or data[8:9] != b"{":
        raise MaskFormatError("not a mask file: it does not begin as a safetensors file")
    if size > len(data) - 8:
        raise MaskFormatError(f"truncated: the header has {size} bytes and the file {len(data)}")
    try:
        header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=_without_repeats)
        json.dumps(header, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise MaskFormatError(f"not a mask file: its safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise MaskFormatError("not a mask file: its safetensors header is no JSON object")
    return header, data[8 + size :]


def _place(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and first and last byte within the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MaskFormatError(f"damaged: tensor {name!r} lacks its dtype, shape or offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MaskFormatError(f"tensor {name!r} is of dtype {dtype!r}, and a mask file holds U8 and F16")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise MaskFormatError(f"damaged: tensor {name!r} has no usable shape or offsets")
    num_bytes = _DTYPES[dtype].itemsize
    for size in shape:
        num_bytes *= size
    if offsets[1] - offsets[0] != num_bytes:
        raise MaskFormatError(f"damaged: tensor {name!r} of shape {shape} does not fill bytes {offsets}")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result
