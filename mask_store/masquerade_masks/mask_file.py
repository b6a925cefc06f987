"""Mask files: one sub-network and how it came about, as one safetensors file.

Tensors: `mask` uint8 `[layers, ceil(intermediate / 8)]`, optional `gain` float16 `[layers, kept]` and `bias`
float16 `[layers, hidden]`. Metadata: see `_metadata`. The digest covers what changes the persona's function;
the metadata beside it have a `checksum` of their own, so that no flipped bit goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masquerade_masks.container import Tensors, pack, unpack
from masquerade_masks.durable import write_atomic
from masquerade_masks.errors import BaseMismatch, DigestMismatch, MaskFormatError, MaskShapeError
from masquerade_masks.mask import FFNShape, Mask, check_bits
from masquerade_masks.subnetwork import FORMAT, HalfArray, SubNetwork, check_half, digest_of

_REQUIRED = frozenset(
    {
        "base",
        "created",
        "digest",
        "format",
        "hidden_size",
        "intermediate_size",
        "kept",
        "layers",
        "persona",
        "prompt_sha256",
        "recovery",
        "settings",
        "sparsity",
        "version",
    }
)
_OPTIONAL = frozenset({"attached", "checksum"})
_TENSORS = frozenset({"mask", "gain", "bias"})
_NUMBER = re.compile(r"0|[1-9][0-9]{0,11}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class MaskHeader:
    """What a mask file says about its origin; none of it changes the persona's function."""

    persona: str  # id
    version: int
    recovery: str  # none | vectors | lora | full
    prompt_sha256: str  # of the rendered persona prompt the mask was learned under
    settings: dict[str, Any] = field(default_factory=dict)  # the sculpt's settings and seeds, as JSON has them
    created: str = ""  # RFC 3339, UTC


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A sub-network and its header: the whole content of a mask file."""

    subnetwork: SubNetwork
    header: MaskHeader


def encode(mask_file: MaskFile) -> bytes:
    """The bytes of a mask file, the same for the same content on every machine.

    Raises `MaskFormatError` for a header that JSON or the format cannot hold.
    """
    subnetwork = mask_file.subnetwork
    optional = {"gain": subnetwork.gain, "bias": subnetwork.bias}
    tensors: Tensors = {"mask": subnetwork.mask.bits}
    tensors |= {name: array for name, array in optional.items() if array is not None}
    try:
        metadata = _metadata(mask_file)
        return pack(tensors, metadata | {"checksum": _checksum(metadata)})
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise MaskFormatError(f"the header cannot be written: {error}") from error


def decode(data: bytes, *, base: str | None = None, shape: FFNShape | None = None) -> MaskFile:
    """Read and check a mask file; with `base` (a fingerprint) and `shape`, that it belongs to that base.

    Raises `MaskFormatError` (not safetensors, truncated, unknown version, damaged metadata),
    `MaskShapeError`, `MaskIndexError` (a padding bit is set), `EmptyLayer`, `NonFiniteMask`,
    `DigestMismatch` and `BaseMismatch`.
    """
    tensors, metadata = unpack(data)
    _check_keys(tensors, metadata)
    file_shape = FFNShape(*(_number(metadata, key, least=1) for key in ("layers", "intermediate_size", "hidden_size")))
    subnetwork = _subnetwork(tensors, metadata, file_shape)
    header = _header(metadata)
    _check_consistency(metadata, subnetwork)
    if base is not None and subnetwork.base != base:
        raise BaseMismatch(base, subnetwork.base)
    if shape is not None and file_shape != shape:
        raise MaskShapeError(f"the mask is for {file_shape}, and the base has {shape}")
    return MaskFile(subnetwork, header)


def read(path: Path, *, base: str | None = None, shape: FFNShape | None = None) -> MaskFile:
    """`decode` of a file. Raises what it raises, and `OSError` where the file cannot be read."""
    return decode(path.read_bytes(), base=base, shape=shape)


def write(path: Path, mask_file: MaskFile) -> None:
    """`encode` into a file that is whole or absent, flushed to the disk on return. Raises `StorageFull`."""
    write_atomic(path, encode(mask_file))


def _metadata(mask_file: MaskFile) -> dict[str, str]:
    subnetwork, header = mask_file.subnetwork, mask_file.header
    metadata = {
        "format": FORMAT,
        "base": subnetwork.base,
        "digest": subnetwork.digest,
        "layers": str(subnetwork.shape.num_layers),
        "intermediate_size": str(subnetwork.shape.intermediate_size),
        "hidden_size": str(subnetwork.shape.hidden_size),
        "kept": str(subnetwork.mask.kept),
        "sparsity": f"{subnetwork.mask.sparsity:.6g}",
        "persona": header.persona,
        "version": str(header.version),
        "recovery": header.recovery,
        "prompt_sha256": header.prompt_sha256,
        "settings": _canonical_json(header.settings),
        "created": header.created,
    }
    if subnetwork.attached:
        metadata["attached"] = _canonical_json([list(entry) for entry in subnetwork.attached])
    return metadata


def _checksum(metadata: Mapping[str, str]) -> str:
    """Sha256 over the canonical JSON of the metadata without the checksum itself."""
    others = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(_canonical_json(others).encode()).hexdigest()


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_keys(tensors: Tensors, metadata: Mapping[str, str]) -> None:
    found = metadata.get("format")
    if found is None:
        raise MaskFormatError("not a mask file: a safetensors file without the format entry")
    if found != FORMAT:
        raise MaskFormatError(f"the format is {found!r}, and this version of Masquerade reads {FORMAT!r}")
    if missing := _REQUIRED - metadata.keys():
        raise MaskFormatError(f"the metadata lack {', '.join(sorted(missing))}")
    if unknown := metadata.keys() - _REQUIRED - _OPTIONAL:
        raise MaskFormatError(f"the metadata hold unknown entries: {', '.join(sorted(unknown))}")
    if "mask" not in tensors:
        raise MaskFormatError("there is no tensor named mask")
    if unknown := tensors.keys() - _TENSORS:
        raise MaskFormatError(f"there are unknown tensors: {', '.join(sorted(unknown))}")


def _subnetwork(tensors: Tensors, metadata: Mapping[str, str], shape: FFNShape) -> SubNetwork:
    """The digest is checked before the counts: of an altered file it is the truer reason."""
    bits, gain, bias = tensors["mask"], tensors.get("gain"), tensors.get("bias")
    _check_tensors(bits, gain, bias, kept=_number(metadata, "kept", least=1), shape=shape)
    attached = _attached(metadata)
    found = digest_of(metadata["base"], shape, bits=bits, gain=gain, bias=bias, attached=attached)
    if found != metadata["digest"]:
        raise DigestMismatch(metadata["digest"], found)
    mask = Mask(bits, shape.intermediate_size)
    if mask.kept != int(metadata["kept"]):
        raise MaskShapeError(f"the mask keeps {mask.kept} neurons a layer, its metadata say {metadata['kept']}")
    return SubNetwork(metadata["base"], shape, mask, gain, bias, attached)


def _check_tensors(bits: Any, gain: HalfArray | None, bias: HalfArray | None, *, kept: int, shape: FFNShape) -> None:
    check_bits(bits, shape.intermediate_size)
    if bits.shape[0] != shape.num_layers:
        raise MaskShapeError(f"the mask has {bits.shape[0]} layers, its metadata say {shape.num_layers}")
    if gain is not None:
        check_half("gain", gain, (shape.num_layers, kept))
    if bias is not None:
        check_half("bias", bias, (shape.num_layers, shape.hidden_size))


def _header(metadata: Mapping[str, str]) -> MaskHeader:
    settings = _json(metadata, "settings")
    if not isinstance(settings, dict):
        raise MaskFormatError("the metadata's settings are not a JSON object")
    return MaskHeader(
        persona=metadata["persona"],
        version=_number(metadata, "version", least=0),
        recovery=metadata["recovery"],
        prompt_sha256=metadata["prompt_sha256"],
        settings=settings,
        created=metadata["created"],
    )


def _check_consistency(metadata: Mapping[str, str], subnetwork: SubNetwork) -> None:
    checksum = metadata.get("checksum")  # absent in files that other tools wrote
    if checksum is not None and checksum != _checksum(metadata):
        raise MaskFormatError("the metadata were altered or damaged: they do not give their checksum")
    try:
        stated = float(metadata["sparsity"])
    except ValueError:
        stated = math.nan
    if not abs(stated - subnetwork.mask.sparsity) < 1e-5:  # written with six digits
        actual = f"{subnetwork.mask.sparsity:.6g}"
        raise MaskFormatError(f"the metadata's sparsity is {metadata['sparsity']!r}, the mask's {actual}")


def _attached(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    entries = _json(metadata, "attached") if "attached" in metadata else []
    if not (isinstance(entries, list) and all(_is_attachment(entry) for entry in entries)):
        raise MaskFormatError("the metadata's attached entry is not a list of names and sha256 digests")
    return tuple(sorted((name, digest) for name, digest in entries))


def _is_attachment(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(part, str) for part in entry)
        and _SHA256.fullmatch(entry[1]) is not None
    )


def _number(metadata: Mapping[str, str], key: str, *, least: int) -> int:
    if not _NUMBER.fullmatch(metadata[key]) or int(metadata[key]) < least:
        raise MaskFormatError(f"the metadata's {key} is {metadata[key]!r}, not a whole number from {least}")
    return int(metadata[key])


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        value = json.loads(metadata[key])
        _canonical_json(value)  # refuses NaN and infinity, which Python's reader admits
        return value
    except (ValueError, RecursionError) as error:
        raise MaskFormatError(f"the metadata's {key} are not JSON: {error}") from error
