"""A persona's sub-network as a GGUF file: the base's file with smaller FFNs, read by llama.cpp and what embeds it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from masquerade_engine.base import Base
from masquerade_masks import SettingError, SubNetwork
from masquerade_masks.durable import flush_directory, storage_full_as_error
from masquerade_pruner.export.chat_template import template_in_character
from masquerade_pruner.export.checkpoint import check_base
from masquerade_pruner.export.persona import ExportedPersona
from masquerade_pruner.export.pruned_ffn import PROJECTIONS, Projection, PrunedFFN

Array = npt.NDArray[Any]

_BIAS_ARCHITECTURES = frozenset({"llama"})  # whose loader reads blk.*.ffn_down.bias; qwen2 and qwen3 refuse the file
_FLOATS = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})


class TensorType(StrEnum):
    """How the matrices of the file are stored; norms and other vectors stay as the base has them."""

    BASE = "base"  # as the base's file has them; what cannot be cut from it (down) in q8_0, or f16 in a float file
    F16 = "f16"
    Q8_0 = "q8_0"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the new file; its data are made when they are written."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # in numpy's order: [out, in]
    data: Callable[[], Array]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return self.shape
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.type))

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        names = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
        return np.dtype(names.get(self.type, "u1"))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.stored_shape)) * self.stored_dtype.itemsize


def export_gguf(
    base: Base,
    subnetwork: SubNetwork,
    target: Path,
    persona: ExportedPersona,
    *,
    tensor_type: TensorType = TensorType.BASE,
) -> bool:
    """Write the sub-network to `target`, whole or not at all; return whether its chat template is in character.

    Raises `BaseMismatch`, `StorageFull`, and `SettingError`: a base that is no GGUF file, a target that is the base's
    own file or a folder, biases where llama.cpp reads none, sizes that q8_0's blocks do not fit, weights beyond f16.
    """
    check_base(base, subnetwork)
    _check_files(base, target)
    reader = GGUFReader(base.source)
    architecture = str(_field(reader, "general.architecture"))
    if subnetwork.bias is not None and architecture not in _BIAS_ARCHITECTURES:
        raise SettingError(
            "format",
            f"this persona has biases, and llama.cpp reads none in the MLP of its {architecture} architecture; "
            "export a version recovered without biases",
        )
    entries = _entries(reader, subnetwork, tensor_type)
    template = None
    if persona.system_prompt is not None:
        template = template_in_character(base.tokenizer, persona.system_prompt)
    metadata = _metadata(architecture, base, subnetwork, persona, entries, tensor_type, template)
    with _replacing(target, sum(entry.num_bytes for entry in entries)) as beside:
        _write(beside, reader, architecture, metadata, entries)
    return template is not None


def _check_files(base: Base, target: Path) -> None:
    if base.source.suffix != ".gguf":
        raise SettingError(
            "format",
            f"{base.name} is no GGUF file, whose metadata and tokenizer would be copied; export hf and let llama.cpp's "
            "convert_hf_to_gguf.py read that folder, or give --model a GGUF file of the base the mask was learned on",
        )
    if target.is_dir():
        raise SettingError("target", f"{target} is a folder; name a file")
    if target.resolve() == base.source:
        raise SettingError("target", f"{target} is the base's own file; name another")


# --- tensors


def _entries(reader: GGUFReader, subnetwork: SubNetwork, tensor_type: TensorType) -> list[_Entry]:
    """The new file's tensors in the order of the base's."""
    pruned = PrunedFFN(subnetwork)
    of_base = tensor_type is TensorType.BASE and not subnetwork.attached
    ffn = {
        f"blk.{layer}.ffn_{projection.removesuffix('_proj')}.weight": (layer, projection)
        for layer in range(subnetwork.shape.num_layers)
        for projection in PROJECTIONS
    }
    if missing := ffn.keys() - {tensor.name for tensor in reader.tensors}:
        raise SettingError("format", f"the base's GGUF file has no tensor {min(missing)}; is it one part of several?")
    entries: list[_Entry] = []
    for tensor in reader.tensors:
        if (place := ffn.get(tensor.name)) is None:
            entries.append(_copied(tensor, tensor_type))
        elif of_base and place[1] != "down_proj":
            entries.append(_cut_rows(tensor, pruned.kept(place[0]).numpy()))
        else:
            entries.append(_remade(tensor, *place, pruned, subnetwork.mask.kept, tensor_type))
    for layer, bias in enumerate(() if (biases := subnetwork.biases()) is None else biases):
        name = f"blk.{layer}.ffn_down.bias"
        entries.append(_Entry(name, GGMLQuantizationType.F32, bias.shape, lambda bias=bias: bias))  # type: ignore[misc]
    return entries


def _copied(tensor: Any, tensor_type: TensorType) -> _Entry:
    shape = _shape(tensor)
    if tensor_type is TensorType.BASE or len(shape) < 2:
        return _Entry(tensor.name, tensor.tensor_type, shape, lambda: tensor.data)
    stored = _stored_as(tensor, tensor_type, shape[-1])
    return _Entry(tensor.name, stored, shape, lambda: _quantised(tensor.name, _dequantised(tensor), stored))


def _cut_rows(tensor: Any, kept: npt.NDArray[np.int64]) -> _Entry:
    """A row is a whole number of blocks, so its bytes are the base's own."""
    shape = (len(kept), _shape(tensor)[1])
    return _Entry(tensor.name, tensor.tensor_type, shape, lambda: np.ascontiguousarray(tensor.data[kept]))


def _remade(
    tensor: Any, layer: int, projection: Projection, pruned: PrunedFFN, kept: int, tensor_type: TensorType
) -> _Entry:
    rows, columns = _shape(tensor)
    shape = (rows, kept) if projection == "down_proj" else (kept, columns)
    stored = _stored_as(tensor, tensor_type, shape[1])

    def data() -> Array:
        weight = pruned.weight(layer, projection, torch.from_numpy(_dequantised(tensor)))
        return _quantised(tensor.name, weight.numpy(), stored)

    return _Entry(tensor.name, stored, shape, data)


def _stored_as(tensor: Any, tensor_type: TensorType, row_length: int) -> GGMLQuantizationType:
    """The type of a matrix that is not copied byte for byte. Raises `SettingError`."""
    if tensor_type is TensorType.F16:
        return GGMLQuantizationType.F16
    if tensor_type is TensorType.BASE and tensor.tensor_type in _FLOATS:
        return GGMLQuantizationType.F32 if tensor.tensor_type == GGMLQuantizationType.F32 else GGMLQuantizationType.F16
    block, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    if row_length % block:
        raise SettingError(
            "type", f"q8_0 stores blocks of {block}, and the rows of {tensor.name} would be {row_length} long; use f16"
        )
    return GGMLQuantizationType.Q8_0


def _dequantised(tensor: Any) -> npt.NDArray[np.float32]:
    try:
        values: npt.NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise SettingError("format", f"{tensor.name} is stored as {tensor.tensor_type.name}, which: {error}") from error
    return np.array(values, dtype=np.float32).reshape(_shape(tensor))  # owned and writable, as torch wants it


def _quantised(name: str, values: npt.NDArray[np.float32], stored: GGMLQuantizationType) -> Array:
    with np.errstate(over="ignore"):
        data: Array = gguf.quantize(values, stored)
    if stored == GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise SettingError("type", f"{name} holds a weight beyond f16's range; use q8_0")
    return np.ascontiguousarray(data)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


# --- metadata


def _metadata(
    architecture: str,
    base: Base,
    subnetwork: SubNetwork,
    persona: ExportedPersona,
    entries: list[_Entry],
    tensor_type: TensorType,
    template: str | None,
) -> dict[str, tuple[Any, GGUFValueType]]:
    """What differs from the base's metadata, by key; all else is copied."""
    string, number = GGUFValueType.STRING, GGUFValueType.UINT32
    num_parameters = sum(int(np.prod(entry.shape)) for entry in entries)
    metadata: dict[str, tuple[Any, GGUFValueType]] = {
        f"{architecture}.feed_forward_length": (subnetwork.mask.kept, number),
        "general.name": (f"{persona.id} ({base.name})", string),
        "general.finetune": (persona.id, string),
        "general.size_label": (gguf.size_label(num_parameters, 0, 0, 0), string),
        "general.quantization_version": (gguf.GGML_QUANT_VERSION, number),
        "masquerade.persona": (persona.id, string),
        "masquerade.version": (persona.version, number),
        "masquerade.base": (subnetwork.base, string),
        "masquerade.digest": (subnetwork.digest, string),
    }
    if tensor_type is not TensorType.BASE:
        f16 = tensor_type is TensorType.F16
        file_type = LlamaFileType.MOSTLY_F16 if f16 else LlamaFileType.MOSTLY_Q8_0
        metadata["general.file_type"] = (int(file_type), number)
    if persona.system_prompt is not None:
        metadata["general.description"] = (persona.system_prompt, string)
        metadata["masquerade.system_prompt"] = (persona.system_prompt, string)
    if template is not None:
        metadata["tokenizer.chat_template"] = (template, string)
    return metadata


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


# --- the file


def _write(
    path: Path,
    reader: GGUFReader,
    architecture: str,
    metadata: dict[str, tuple[Any, GGUFValueType]],
    entries: list[_Entry],
) -> None:
    writer = GGUFWriter(path, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    try:
        for field in reader.fields.values():
            # The first is the writer's own, the second virtual; an empty array says nothing and cannot be written.
            own = field.name == "general.architecture" or field.name.startswith("GGUF.")
            if not own and field.name not in metadata and (value := field.contents()) != []:
                kind = field.types[0]
                sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, value, kind, sub_type=sub_type)
        for key, (value, kind) in metadata.items():
            writer.add_key_value(key, value, kind)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.stored_shape, entry.stored_dtype, entry.num_bytes, entry.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
    finally:
        writer.close()


@contextmanager
def _replacing(target: Path, num_bytes: int) -> Iterator[Path]:
    """A path to write; it becomes `target` by one rename once its bytes are on the disk."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    with storage_full_as_error(target, num_bytes):
        try:
            yield beside
            with beside.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        flush_directory(target.parent)
