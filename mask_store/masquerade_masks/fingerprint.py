"""Fingerprints: the identity of a base, a content hash of its configuration and weights.

It does not depend on where the base lies, on how its weights are sharded, or on configuration fields that
leave the function as it is. A hash is cached by its files' paths, sizes and modification times.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masquerade_masks.durable import write_json_atomic
from masquerade_masks.errors import BaseNotFound, StorageFull

_DIRECTORY_SCHEME = "masquerade.base.directory/1"
_GGUF_SCHEME = "masquerade.base.gguf/1"
_CHUNK = 4 << 20  # bytes; sha256 runs at memory speed from about 1 MiB a call
_MAX_HEADER = 100 << 20  # bytes, the safetensors format's own limit

# Everything else counts as changing the function: an unknown field errs towards another fingerprint.
_INERT_FIELDS = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes from the beginning of the file
    end: int


def fingerprint_directory(path: Path, cache_dir: Path) -> str:
    """Sha256 (lower-case hex) of a Hugging Face directory.

    Over the canonical JSON of the configuration's fields that change the function, then every tensor's name,
    dtype, shape and raw bytes in name order. Raises `BaseNotFound` where the configuration or a weight file
    is missing or damaged.
    """
    path = path.resolve()
    config, weights = path / "config.json", _weight_files(path)
    return _cached(path, [config, *weights], cache_dir, lambda: _hash_directory(path, config, weights))


def fingerprint_gguf(path: Path, cache_dir: Path) -> str:
    """Sha256 (lower-case hex) of a GGUF file's bytes after the scheme's name. Raises `BaseNotFound`."""
    path = path.resolve()
    if not path.is_file():
        raise BaseNotFound(str(path), "there is no such GGUF file")
    return _cached(path, [path], cache_dir, lambda: _hash_gguf(path))


def _hash_gguf(path: Path) -> str:
    sha = hashlib.sha256(_GGUF_SCHEME.encode() + b"\0")
    _hash_range(sha, path, 0, path.stat().st_size)
    return sha.hexdigest()


def _hash_directory(path: Path, config: Path, weights: Sequence[Path]) -> str:
    tensors = sorted((t for file in weights for t in _stored_tensors(path, file)), key=lambda tensor: tensor.name)
    for before, after in itertools.pairwise(tensors):
        if before.name == after.name:
            raise BaseNotFound(str(path), f"{before.file.name} and {after.file.name} both hold {before.name!r}")
    sha = hashlib.sha256(_DIRECTORY_SCHEME.encode() + b"\0")
    _hash_field(sha, _canonical_config(_read_json(path, config)))
    for tensor in tensors:
        _hash_field(sha, json.dumps([tensor.name, tensor.dtype, list(tensor.shape)]).encode())
        _hash_range(sha, tensor.file, tensor.start, tensor.end)
    return sha.hexdigest()


def _canonical_config(config: dict[str, Any]) -> bytes:
    """A field that is null is the same as one that is absent."""
    changing = {key: value for key, value in config.items() if key not in _INERT_FIELDS and value is not None}
    return json.dumps(changing, sort_keys=True, separators=(",", ":")).encode()


def _weight_files(path: Path) -> list[Path]:
    """The files transformers would load, in its order of preference."""
    if not (path / "config.json").is_file():
        raise BaseNotFound(str(path), "the directory holds no config.json")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise BaseNotFound(str(path), "the directory holds no model.safetensors and no model.safetensors.index.json")
    names = _read_json(path, index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BaseNotFound(str(path), f"{index.name} has no weight_map")
    files = [path / str(name) for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != path or not file.is_file():
            raise BaseNotFound(str(path), f"{index.name} names {file.name!r}, which is not in the directory")
    return files


def _stored_tensors(path: Path, file: Path) -> list[_StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(_MAX_HEADER, size - 8):
            raise BaseNotFound(str(path), f"{file.name} is truncated or not a safetensors file")
        raw = stream.read(header_size)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = [_stored_tensor(name, entry, file, 8 + header_size) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseNotFound(str(path), f"{file.name} has a damaged header: {error}") from error
    if any(not 0 <= tensor.start <= tensor.end <= size for tensor in tensors):
        raise BaseNotFound(str(path), f"{file.name} is truncated")
    return tensors


def _stored_tensor(name: str, entry: dict[str, Any], file: Path, data_start: int) -> _StoredTensor:
    start, end = entry["data_offsets"]
    return _StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, data_start + start, data_start + end)


def _hash_field(sha: hashlib._Hash, content: bytes) -> None:
    sha.update(len(content).to_bytes(8, "little"))
    sha.update(content)


def _hash_range(sha: hashlib._Hash, file: Path, start: int, end: int) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, max(end - start, 1))))
    sha.update((end - start).to_bytes(8, "little"))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while start < end:
            count = stream.readinto(buffer[: end - start])
            if not count:
                raise BaseNotFound(str(file), "the file was cut short while it was read")
            sha.update(buffer[:count])
            start += count


def _read_json(path: Path, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseNotFound(str(path), f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BaseNotFound(str(path), f"{file.name} is not a JSON object")
    return value


def _cached(path: Path, files: Sequence[Path], cache_dir: Path, compute: Callable[[], str]) -> str:
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    entry = cache_dir / "fingerprints" / f"{key}.json"
    state = {"path": str(path), "files": _states(files)}
    with suppress(OSError, ValueError, KeyError, TypeError):  # an unreadable entry is only a miss
        stored = json.loads(entry.read_bytes())
        if {"path": stored["path"], "files": stored["files"]} == state:
            return str(stored["fingerprint"])
    fingerprint = compute()
    if _states(files) == state["files"]:  # not replaced while it was read
        with suppress(OSError, StorageFull):  # a cache that cannot be written costs time, nothing else
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(entry, state | {"fingerprint": fingerprint})
    return fingerprint


def _states(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and modification time of every file, as JSON gives them back."""
    found = [(file, file.stat()) for file in files]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in found]
