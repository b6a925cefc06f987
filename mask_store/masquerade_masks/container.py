"""The safetensors container in canonical form: the same content is always the same bytes.

The `safetensors` package orders metadata by a random hash and would give other bytes on every call. What is
written here is a plain safetensors file that the package reads; what is read here may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from masquerade_masks.errors import MaskFormatError

Tensors = dict[str, npt.NDArray[Any]]

_MAX_HEADER = 16 << 20  # bytes; the settings of a sculpt are a few KiB


@dataclass(frozen=True, slots=True)
class Content:
    """What a file of this kind holds, and what it is called in a refusal."""

    name: str
    dtypes: Mapping[str, np.dtype[Any]]  # by safetensors' names

    def name_of(self, dtype: np.dtype[Any]) -> str:
        return next(name for name, known in self.dtypes.items() if known == dtype)


MASK = Content("mask file", {"U8": np.dtype("u1"), "F16": np.dtype("<f2")})
# numpy has no bfloat16: its bits stand for it.
ATTACHED = Content(
    "file of attached weights", {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
)


def pack(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str], content: Content = MASK) -> bytes:
    """The whole file: see `chunks`."""
    return b"".join(chunks(tensors, metadata, content))


def chunks(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str], content: Content
) -> Iterator[bytes | memoryview]:
    """The header, then every tensor: widest dtype first and then by name, under metadata sorted by key.

    The header is padded with spaces to 8 bytes, as the safetensors package does, so tensors lie aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        dtype = content.name_of(tensor.dtype.newbyteorder("<"))
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        stored = tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False)
        yield stored.reshape(-1).view(np.uint8).data


def unpack(data: bytes | memoryview, content: Content = MASK) -> tuple[Tensors, dict[str, str]]:
    """Read-only tensors by name, and the metadata; tensors are views of `data`.

    Raises `MaskFormatError` for what is not a whole safetensors file of the content's dtypes: truncated,
    a damaged header, a key given twice, tensors that overlap, leave gaps or end elsewhere than the file.
    """
    header, body = _split(memoryview(data), content.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MaskFormatError(f"not a {content.name}: the safetensors metadata are not strings")
    places = sorted(((name, *_place(name, entry, content)) for name, entry in header.items()), key=lambda at: at[3:])
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


def _split(data: memoryview, name: str) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise MaskFormatError(f"not a {name}: {len(data)} bytes are too few for a safetensors header")
    size = int.from_bytes(data[:8], "little")
    if size > _MAX_HEADER or bytes(data[8:9]) != b"{":
        raise MaskFormatError(f"not a {name}: it does not begin as a safetensors file")
    if size > len(data) - 8:
        raise MaskFormatError(f"truncated: the header has {size} bytes and the file {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + size]).decode(), object_pairs_hook=_without_repeats)
        json.dumps(header, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise MaskFormatError(f"not a {name}: its safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise MaskFormatError(f"not a {name}: its safetensors header is no JSON object")
    return header, data[8 + size :]


def _place(name: str, entry: Any, content: Content) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """A tensor's dtype, shape, and first and last byte within the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MaskFormatError(f"damaged: tensor {name!r} lacks its dtype, shape or offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in content.dtypes:
        known = list(content.dtypes)
        held = f"{', '.join(known[:-1])} and {known[-1]}"
        raise MaskFormatError(f"tensor {name!r} is of dtype {dtype!r}, and a {content.name} holds {held}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise MaskFormatError(f"damaged: tensor {name!r} has no usable shape or offsets")
    num_bytes = content.dtypes[dtype].itemsize
    for size in shape:
        num_bytes *= size
    if offsets[1] - offsets[0] != num_bytes:
        raise MaskFormatError(f"damaged: tensor {name!r} of shape {shape} does not fill bytes {offsets}")
    return content.dtypes[dtype], tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result
