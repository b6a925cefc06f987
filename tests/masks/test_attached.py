from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from masquerade_masks import (
    Attached,
    DigestMismatch,
    FFNShape,
    MaskFormatError,
    MaskShapeError,
    NonFiniteMask,
    SubNetwork,
    attached_file,
    read_peft,
    write_peft,
)
from masquerade_masks.attached import full_name, lora_name
from masquerade_masks.container import ATTACHED, pack

SHAPE = FFNShape(2, 96, 16)
KEPT = 64
KINDS = ["lora", "full"]

Make = Callable[..., Attached]


def written(attached: Attached) -> bytes:
    return b"".join(attached_file.encode(attached))


def test_the_digest_is_sha256_over_length_prefixed_parts() -> None:
    name = lora_name(0, "up_proj", "A")
    attached = Attached("lora", {name: np.array([[1.0, -2.0]], np.float16)}, alpha=16, rank=8)
    parts = [
        (b"format", b"masquerade.attached/1"),
        (b"kind", b"lora"),
        (b"rank", struct.pack("<Q", 8)),
        (b"alpha", struct.pack("<d", 16.0)),
        (name.encode(), b"F16[1, 2]"),
        (name.encode(), struct.pack("<2e", 1, -2)),
    ]
    stream = b"".join(struct.pack("<Q", len(field)) + field for part in parts for field in part)
    assert attached.digest == hashlib.sha256(stream).hexdigest()
    assert attached.scale == 2.0


def test_the_digest_changes_with_everything_that_changes_the_function(make_attached: Make) -> None:
    lora = make_attached("lora", SHAPE, KEPT)
    name = lora_name(1, "down_proj", "B")
    other = {**lora.tensors, name: lora.tensors[name] + np.float16(1)}
    as_bf16 = {**lora.tensors, name: lora.tensors[name].view(np.uint16) & np.uint16(0x3FFF)}
    as_half = {**lora.tensors, name: (lora.tensors[name].view(np.uint16) & np.uint16(0x3FFF)).view(np.float16)}
    digests = [
        lora.digest,
        replace(lora, alpha=7.0).digest,
        replace(lora, rank=5).digest,
        replace(lora, tensors=other).digest,
        replace(lora, tensors=as_bf16).digest,
        replace(lora, tensors=as_half).digest,
        make_attached("full", SHAPE, KEPT).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_the_order_in_which_tensors_are_given_does_not_matter(make_attached: Make) -> None:
    lora = make_attached("lora", SHAPE, KEPT)
    assert replace(lora, tensors=dict(reversed(lora.tensors.items()))) == lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_file_is_read_back_and_is_plain_safetensors(
    kind: str, dtype: Any, make_attached: Make, tmp_path: Path
) -> None:
    attached = make_attached(kind, SHAPE, KEPT, dtype=dtype)
    path = tmp_path / attached_file.file_name(attached.digest)
    path.write_bytes(written(attached))
    found = attached_file.read(path)
    assert (found.kind, found.alpha, found.rank) == (kind, attached.alpha, attached.rank)
    assert found == attached
    with pytest.raises(ValueError, match="read-only"):
        next(iter(found.tensors.values()))[0, 0] = 0
    plain = safetensors.numpy.load_file(path)
    assert all(np.array_equal(plain[name], tensor) for name, tensor in attached.tensors.items())


def test_bfloat16_travels_as_its_bits(make_attached: Make) -> None:
    name = full_name(0, "gate_proj")
    full = make_attached("full", SHAPE, KEPT, dtype=np.float32)
    bits = (full.tensors[name].view(np.uint32) >> 16).astype(np.uint16)
    found = attached_file.decode(written(replace(full, tensors={**full.tensors, name: bits})))
    rounded = (full.tensors[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(found.float32(name), rounded)
    assert np.array_equal(found.float32(full_name(1, "up_proj")), full.tensors[full_name(1, "up_proj")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_anywhere_is_refused(kind: str, make_attached: Make) -> None:
    data = written(make_attached(kind, SHAPE, KEPT))
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(MaskFormatError):
            attached_file.decode(data[:length])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(MaskFormatError, match="empty"):
        attached_file.read(tmp_path / "empty")


def test_an_altered_file_is_refused(make_attached: Make) -> None:
    data = bytearray(written(make_attached("lora", SHAPE, KEPT)))
    data[-1] ^= 1
    with pytest.raises(DigestMismatch, match="the file of attached weights was altered or damaged"):
        attached_file.decode(bytes(data))


def test_a_file_over_the_limit_is_refused(make_attached: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(make_attached("lora", SHAPE, KEPT))
    monkeypatch.setattr(attached_file, "MAX_BYTES", len(data) - 1)
    with pytest.raises(MaskFormatError, match=f"may take {len(data) - 1} bytes; these are {len(data)}"):
        attached_file.decode(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "masquerade.attached/2"}, "attached/2"),
        ({"kind": "vectors"}, "vectors"),
        ({"rank": "0"}, "rank '0'"),
        ({"alpha": "nan"}, "alpha 'nan'"),
        ({"note": "x"}, "alpha, digest, format, kind, rank"),
    ],
)
def test_other_metadata_are_refused(changes: dict[str, str], reason: str, make_attached: Make) -> None:
    lora = make_attached("lora", SHAPE, KEPT)
    metadata = {
        "format": "masquerade.attached/1",
        "kind": "lora",
        "digest": lora.digest,
        "rank": "4",
        "alpha": "6.0",
    }
    assert attached_file.decode(pack(lora.tensors, metadata, ATTACHED)) == lora
    with pytest.raises(MaskFormatError, match=reason):
        attached_file.decode(pack(lora.tensors, metadata | changes, ATTACHED))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_values_that_are_not_finite_are_refused(bits: int, make_attached: Make) -> None:
    full = make_attached("full", SHAPE, KEPT)
    name = full_name(1, "up_proj")
    bad = full.tensors[name].view(np.uint16) & np.uint16(0x3FFF)
    bad[3, 2] = bits
    with pytest.raises(NonFiniteMask) as refused:
        replace(full, tensors={**full.tensors, name: bad})
    assert (refused.value.tensor, refused.value.layer) == (name, 1)


@pytest.mark.parametrize(
    ("kind", "alpha", "rank"),
    [("lora", None, 4), ("lora", 8.0, None), ("lora", 8.0, 0), ("lora", 0.0, 4), ("lora", float("inf"), 4),
     ("full", 8.0, None), ("full", None, 4), ("ia3", None, None)],
)  # fmt: skip
def test_other_numbers_are_refused(kind: Any, alpha: float | None, rank: int | None) -> None:
    with pytest.raises(MaskFormatError):
        Attached(kind, {}, alpha, rank)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(MaskShapeError, match="float64"):
        Attached("full", {full_name(0, "up_proj"): np.zeros((2, 2))})


# Attached to a sub-network


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_attached_by_being_given(
    kind: str, make_attached: Make, make_subnetwork: Callable[..., SubNetwork]
) -> None:
    alone, attached = make_subnetwork(SHAPE, KEPT), make_attached(kind, SHAPE, KEPT)
    with_weights = replace(alone, weights=attached)
    assert with_weights.attached == ((kind, attached.digest),)
    assert with_weights == replace(alone, attached=((kind, attached.digest),)) != alone
    assert replace(with_weights, weights=None).attached == with_weights.attached
    assert with_weights.has_own_ffn == (kind == "full")
    with pytest.raises(MaskFormatError, match="not those that the mask names"):
        replace(with_weights, weights=make_attached(kind, SHAPE, KEPT, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_are_refused(
    kind: str, make_attached: Make, make_subnetwork: Callable[..., SubNetwork]
) -> None:
    subnetwork, attached = make_subnetwork(SHAPE, KEPT), make_attached(kind, SHAPE, KEPT)
    first, *others = attached.tensors
    with pytest.raises(MaskFormatError, match=f"lack {first}"):
        replace(subnetwork, weights=replace(attached, tensors={name: attached.tensors[name] for name in others}))
    extra = {**attached.tensors, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": GOOD}
    with pytest.raises(MaskFormatError, match=r"no place for: .*q_proj"):
        replace(subnetwork, weights=replace(attached, tensors=extra))
    with pytest.raises(MaskShapeError, match=rf"{first} is .* here; this is \[2, 2\]"):
        replace(subnetwork, weights=replace(attached, tensors={**attached.tensors, first: GOOD}))
    with pytest.raises(MaskFormatError, match=r"and 3 more|lack"):
        replace(subnetwork, weights=make_attached(kind, FFNShape(1, 96, 16), KEPT))


GOOD = np.zeros((2, 2), np.float16)


# PEFT


def test_a_peft_directory_is_read_back(make_attached: Make, tmp_path: Path) -> None:
    lora = make_attached("lora", SHAPE, KEPT)
    write_peft(lora, tmp_path / "adapter", base_model="a/base")
    assert read_peft(tmp_path / "adapter") == lora
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6.0, "a/base")
    assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    plain = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in plain


def test_only_low_rank_updates_are_a_peft_adapter(make_attached: Make, tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="are full"):
        write_peft(make_attached("full", SHAPE, KEPT), tmp_path, base_model="a/base")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "not of a LoRA adapter"),
        ({"use_dora": True}, "use_dora True"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"up_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        ({"r": "4"}, "not two numbers"),
        ({"lora_alpha": None}, "not two numbers"),
    ],
)
def test_an_adapter_of_another_function_is_refused(
    changes: dict[str, Any], reason: str, make_attached: Make, tmp_path: Path
) -> None:
    write_peft(make_attached("lora", SHAPE, KEPT), tmp_path, base_model="a/base")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(MaskFormatError, match=reason):
        read_peft(tmp_path)


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match=r"no adapter_config\.json"):
        read_peft(tmp_path)
