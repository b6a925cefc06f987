from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from masquerade_masks import BaseNotFound, fingerprint, fingerprint_directory, fingerprint_gguf

TENSORS: dict[str, np.ndarray] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.float16),
    "c": np.zeros((0, 3), np.float32),
}
CONFIG = {"model_type": "llama", "hidden_size": 2, "rope_theta": 10000.0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    write_config(directory, CONFIG)
    safetensors.numpy.save_file(TENSORS, directory / "model.safetensors")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def field(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def test_the_fingerprint_is_this_one(base: Path, cache: Path) -> None:
    stream = b"masquerade.base.directory/1\0"
    stream += field(b'{"hidden_size":2,"model_type":"llama","rope_theta":10000.0}')
    stream += field(b'["a", "F16", [4]]') + field(TENSORS["a"].tobytes())
    stream += field(b'["b", "F32", [2, 3]]') + field(TENSORS["b"].tobytes())
    stream += field(b'["c", "F32", [0, 3]]') + field(b"")
    assert fingerprint_directory(base, cache) == hashlib.sha256(stream).hexdigest()
    assert fingerprint_directory(base, cache) == "8bd9866130e7d55867e67477cf47ff44062ea36097932ddf6a9fe30c43a53728"


def test_sharding_and_place_do_not_matter(base: Path, cache: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "elsewhere"
    sharded.mkdir()
    write_config(sharded, CONFIG)
    safetensors.numpy.save_file({"b": TENSORS["b"]}, sharded / "model-1.safetensors", {"format": "pt"})
    safetensors.numpy.save_file({name: TENSORS[name] for name in "ca"}, sharded / "model-2.safetensors")
    weight_map = {"b": "model-1.safetensors", "a": "model-2.safetensors", "c": "model-2.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    safetensors.numpy.save_file({"lora": TENSORS["a"]}, sharded / "adapter_model.safetensors")
    assert fingerprint_directory(sharded, cache) == fingerprint_directory(base, cache)


def test_fields_that_leave_the_function_do_not_matter(base: Path, cache: Path) -> None:
    before = fingerprint_directory(base, cache)
    inert = {
        "transformers_version": "5.23.0",
        "_name_or_path": "somewhere",
        "torch_dtype": "bfloat16",
        "dtype": "float32",
        "use_cache": False,
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": None,
    }
    write_config(base, inert | dict(reversed(CONFIG.items())))
    assert fingerprint_directory(base, cache) == before


@pytest.mark.parametrize(
    "change", [{"hidden_size": 3}, {"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}, {"new_field": 1}]
)
def test_fields_that_change_the_function_matter(base: Path, cache: Path, change: dict[str, Any]) -> None:
    before = fingerprint_directory(base, cache)
    write_config(base, CONFIG | change)
    assert fingerprint_directory(base, cache) != before


@pytest.mark.parametrize(
    "change",
    [
        {"a": np.arange(4, dtype=np.float16) + np.float16(1)},
        {"a": np.arange(4, dtype=np.float16).reshape(2, 2)},
        {"a": np.arange(4, dtype=np.float16).view(np.int16)},
        {"d": np.zeros(1, np.float32)},
    ],
)
def test_weights_matter(base: Path, cache: Path, change: dict[str, np.ndarray]) -> None:
    before = fingerprint_directory(base, cache)
    safetensors.numpy.save_file(TENSORS | change, base / "model.safetensors")
    assert fingerprint_directory(base, cache) != before


def test_a_second_call_reads_the_cache(
    base: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + b"\1" * 100)
    first = fingerprint_directory(base, cache), fingerprint_gguf(gguf, cache)
    monkeypatch.setattr(fingerprint, "_hash_range", lambda *_: pytest.fail("hashed again"))
    assert (fingerprint_directory(base, cache), fingerprint_gguf(gguf, cache)) == first
    os.utime(gguf, ns=(1, 1))
    with pytest.raises(BaseException, match="hashed again"):
        fingerprint_gguf(gguf, cache)


def test_a_damaged_or_unwritable_cache_costs_only_time(base: Path, cache: Path) -> None:
    first = fingerprint_directory(base, cache)
    (entry,) = (cache / "fingerprints").iterdir()
    for damage in (b"", b"[]", b"{}", b'{"path": 1', b"\xff"):
        entry.write_bytes(damage)
        assert fingerprint_directory(base, cache) == first
    shutil.rmtree(cache)
    cache.write_bytes(b"a file where the directory should be")
    assert fingerprint_directory(base, cache) == first


def test_a_full_disk_costs_only_time(base: Path, cache: Path, full_disk: Callable[[], None]) -> None:
    full_disk()
    assert fingerprint_directory(base, cache) == fingerprint_directory(base, cache)


def test_a_gguf_is_its_bytes_under_the_schemes_name(tmp_path: Path, cache: Path) -> None:
    gguf = tmp_path / "model.gguf"
    content = b"GGUF" + bytes(range(256)) * 5
    gguf.write_bytes(content)
    stream = b"masquerade.base.gguf/1\0" + field(content)
    assert fingerprint_gguf(gguf, cache) == hashlib.sha256(stream).hexdigest()
    gguf.write_bytes(content + b"\0")
    assert fingerprint_gguf(gguf, cache) != hashlib.sha256(stream).hexdigest()


def test_a_real_tiny_base_has_one(make_tiny_base: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    one = fingerprint_directory(make_tiny_base(tmp_path / "one"), cache)
    assert one == fingerprint_directory(make_tiny_base(tmp_path / "same"), cache)
    assert one != fingerprint_directory(make_tiny_base(tmp_path / "other", seed=1), cache)
    assert len(one) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"[]", "not a JSON object"),
        ("model.safetensors", None, "no model.safetensors and no"),
        ("model.safetensors", b"", "truncated or not"),
        ("model.safetensors", b"\x80\x02PK" * 9, "truncated or not"),
        ("model.safetensors", b"\x02" + b"\0" * 7 + b"[]", "damaged header"),
        ("model.safetensors", b"\x08" + b"\0" * 7 + b'{"a":{}}', "damaged header"),
    ],
)
def test_what_is_no_base_is_refused(base: Path, cache: Path, name: str, content: bytes | None, message: str) -> None:
    (base / name).unlink()
    if content is not None:
        (base / name).write_bytes(content)
    with pytest.raises(BaseNotFound, match=message):
        fingerprint_directory(base, cache)


def test_truncated_weights_are_refused(base: Path, cache: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BaseNotFound, match="truncated"):
        fingerprint_directory(base, cache)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "not in the directory"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(base: Path, cache: Path, index: dict[str, Any], message: str) -> None:
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseNotFound, match=message):
        fingerprint_directory(base, cache)


def test_a_tensor_in_two_shards_is_refused(base: Path, cache: Path) -> None:
    (base / "model.safetensors").unlink()
    for shard in ("1.safetensors", "2.safetensors"):
        safetensors.numpy.save_file(TENSORS, base / shard)
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BaseNotFound, match="both hold 'a'"):
        fingerprint_directory(base, cache)


def test_a_missing_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(BaseNotFound, match="no such GGUF"):
        fingerprint_gguf(tmp_path / "gone.gguf", cache)
