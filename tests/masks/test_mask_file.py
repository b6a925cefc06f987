from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from masquerade_masks import (
    BaseMismatch,
    DigestMismatch,
    EmptyLayer,
    FFNShape,
    Mask,
    MaskError,
    MaskFile,
    MaskFormatError,
    MaskHeader,
    MaskIndexError,
    MaskShapeError,
    NonFiniteMask,
    SubNetwork,
    mask_file,
)
from masquerade_masks.subnetwork import digest_of

# 2 layers x 11 neurons, 3 kept, hidden size 2; gains and biases.
GOLDEN = MaskFile(
    SubNetwork(
        base="00ff" * 16,
        shape=FFNShape(2, 11, 2),
        mask=Mask.from_kept_indices([[0, 3, 10], [1, 2, 8]], 11),
        gain=np.array([[1, 0.5, 2], [0.25, -1, 1.5]], dtype=np.float16),
        bias=np.array([[0, 0.125], [-0.5, 3]], dtype=np.float16),
    ),
    MaskHeader(
        persona="innkeeper",
        version=3,
        recovery="vectors",
        prompt_sha256="0123456789abcdef" * 4,
        settings={"seed": 7, "preset": "smoke", "note": "Ærø"},
        created="2026-01-02T03:04:05.678Z",
    ),
)
GOLDEN_HEADER = (
    '{"__metadata__":{"base":"00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff",'
    '"checksum":"57cee5cfaef2d8e44711b70fe47a4032d51dbcfc37b17e88da7c325507708fe5",'
    '"created":"2026-01-02T03:04:05.678Z",'
    '"digest":"aa18faa9efa54c7c8524efa3bc683f5d9a9652ec8dddefb3fc1f9468aabfea8f",'
    '"format":"masquerade.mask/1",'
    '"hidden_size":"2",'
    '"intermediate_size":"11",'
    '"kept":"3",'
    '"layers":"2",'
    '"persona":"innkeeper",'
    '"prompt_sha256":"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",'
    '"recovery":"vectors",'
    '"settings":"{\\"note\\":\\"Ærø\\",\\"preset\\":\\"smoke\\",\\"seed\\":7}",'
    '"sparsity":"0.727273",'
    '"version":"3"},'
    '"bias":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},'
    '"gain":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},'
    '"mask":{"dtype":"U8","shape":[2,2],"data_offsets":[20,24]}} '
).encode()
GOLDEN_DATA = bytes.fromhex("0000003000b80042003c00380040003400bc003e09040601")


def rewritten(
    data: bytes,
    *,
    metadata: dict[str, str | None] | None = None,
    redigest: bool = True,
    **tensors: np.ndarray | None,
) -> bytes:
    """The file as another tool would change it: digest made to fit unless told otherwise, no checksum."""
    held = safetensors.numpy.load(data) | tensors
    size = int.from_bytes(data[:8], "little")
    entries: dict[str, Any] = json.loads(data[8 : 8 + size])["__metadata__"] | (metadata or {})
    entries.pop("checksum")
    present = {name: tensor for name, tensor in held.items() if tensor is not None}
    if redigest and "mask" in present:
        shape = FFNShape(*(int(entries[key]) for key in ("layers", "intermediate_size", "hidden_size")))
        entries["digest"] = digest_of(
            entries["base"],
            shape,
            bits=np.ascontiguousarray(present["mask"]),
            gain=present.get("gain"),
            bias=present.get("bias"),
            attached=(),
        )
    saved: bytes = safetensors.numpy.save(present, {key: text for key, text in entries.items() if text is not None})
    return saved


@st.composite
def mask_files(draw: st.DrawFn) -> MaskFile:
    shape = FFNShape(draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 5)))
    kept = draw(st.integers(1, shape.intermediate_size))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = np.stack([rng.permutation(shape.intermediate_size)[:kept] for _ in range(shape.num_layers)])
    halves = st.floats(width=16, allow_nan=False, allow_infinity=False)
    gain, bias = (
        np.array(draw(st.lists(halves, min_size=size, max_size=size)), np.float16).reshape(shape.num_layers, -1)
        if draw(st.booleans())
        else None
        for size in (shape.num_layers * kept, shape.num_layers * shape.hidden_size)
    )
    attached = draw(st.dictionaries(st.sampled_from(["lora", "full"]), st.just("12" * 32)))
    text = st.text(st.characters(codec="utf-8"), max_size=12)
    values = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | text
    header = MaskHeader(
        persona=draw(text),
        version=draw(st.integers(0, 10**6)),
        recovery=draw(text),
        prompt_sha256=draw(text),
        settings=draw(st.dictionaries(text, values | st.lists(values, max_size=3), max_size=3)),
        created=draw(text),
    )
    mask = Mask.from_kept_indices(rows, shape.intermediate_size)
    return MaskFile(SubNetwork(draw(text), shape, mask, gain, bias, tuple(attached.items())), header)


# The format


def test_the_bytes_are_these() -> None:
    assert mask_file.encode(GOLDEN) == len(GOLDEN_HEADER).to_bytes(8, "little") + GOLDEN_HEADER + GOLDEN_DATA
    assert mask_file.decode(mask_file.encode(GOLDEN)) == GOLDEN


@settings(max_examples=60)
@given(mask_files())
def test_a_file_says_what_was_written(content: MaskFile) -> None:
    data = mask_file.encode(content)
    decoded = mask_file.decode(data, base=content.subnetwork.base, shape=content.subnetwork.shape)
    assert decoded == content
    assert decoded.subnetwork.digest == content.subnetwork.digest
    assert decoded.subnetwork.attached == content.subnetwork.attached
    assert mask_file.encode(decoded) == data
    safetensors.numpy.load(data)


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask_file.write(path, GOLDEN)
    with safetensors.safe_open(path, "np") as opened:
        assert set(opened.keys()) == {"mask", "gain", "bias"}
        assert opened.metadata()["format"] == "masquerade.mask/1"
        assert opened.metadata()["sparsity"] == "0.727273"
        assert json.loads(opened.metadata()["settings"]) == GOLDEN.header.settings
        assert opened.get_tensor("gain").tobytes() == GOLDEN_DATA[8:20]


def test_a_file_that_the_safetensors_package_wrote_is_read() -> None:
    assert mask_file.decode(rewritten(mask_file.encode(GOLDEN))) == GOLDEN


def test_the_order_of_settings_does_not_change_the_bytes() -> None:
    settings = dict(reversed(GOLDEN.header.settings.items()))
    reordered = replace(GOLDEN, header=replace(GOLDEN.header, settings=settings))
    assert mask_file.encode(reordered) == mask_file.encode(GOLDEN)


@pytest.mark.parametrize("settings", [{"loss": float("nan")}, {"path": Path("x")}, {"text": "\ud800"}])
def test_settings_that_json_does_not_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MaskFormatError, match="header cannot be written"):
        mask_file.encode(replace(GOLDEN, header=replace(GOLDEN.header, settings=settings)))


def test_a_mask_of_the_bundled_model_is_as_small_as_promised(make_mask_file: Callable[..., MaskFile]) -> None:
    data = mask_file.encode(make_mask_file(shape=FFNShape(30, 1536, 576), kept=1152))
    assert 5760 <= len(data) < 7200  # 30 x 192 bytes of mask


# Damage


def test_every_truncation_is_refused() -> None:
    data = mask_file.encode(GOLDEN)
    for length in range(len(data)):
        with pytest.raises(MaskFormatError, match=r"not a mask file|truncated"):
            mask_file.decode(data[:length])


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(mask_file.encode(GOLDEN))
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(MaskError):
                mask_file.decode(bytes(data))
            data[position] ^= 1 << bit


def test_a_flipped_bit_in_a_tensor_is_a_digest_mismatch() -> None:
    data = bytearray(mask_file.encode(GOLDEN))
    start = 8 + int.from_bytes(data[:8], "little")
    for place in (start, start + 8, len(data) - 4):  # bias, gain, mask
        flipped = data.copy()
        flipped[place] ^= 1
        with pytest.raises(DigestMismatch, match="altered or damaged") as refused:
            mask_file.decode(bytes(flipped))
        assert refused.value.expected == GOLDEN.subnetwork.digest


def test_altered_metadata_are_refused() -> None:
    data = mask_file.encode(GOLDEN)
    for old, new in (
        (b"innkeeper", b"innkeepes"),
        (b'"version":"3"', b'"version":"2"'),
        (b"05.678Z", b"05.679Z"),
    ):
        assert old in data
        with pytest.raises(MaskFormatError, match="metadata were altered or damaged"):
            mask_file.decode(data.replace(old, new))
    with pytest.raises(DigestMismatch):
        mask_file.decode(data.replace(b"00ff00ff", b"00fe00ff", 1))


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(MaskFormatError, match="1 bytes follow the last tensor"):
        mask_file.decode(mask_file.encode(GOLDEN) + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04}q\x00.",
        b"PK\x03\x04" + b"\0" * 60,
        b"GGUF" + b"\0" * 60,
        b"\xff" * 64,
        b"\x02" + b"\0" * 7 + b"{x",
        b"\x02" + b"\0" * 7 + b"\xff\xfe",
        b"\x02" + b"\0" * 7 + b"{}",
    ],
)
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    with pytest.raises(MaskFormatError, match="not a mask file"):
        mask_file.decode(data)


def test_deep_nesting_is_refused_and_does_not_crash() -> None:
    header = b'{"mask":' + b"[" * 100_000
    with pytest.raises(MaskFormatError):
        mask_file.decode(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MaskFormatError, match="settings"):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), metadata={"settings": "[" * 100_000}))


def test_a_safetensors_file_that_is_no_mask_is_refused() -> None:
    plain = safetensors.numpy.save({"weight": np.zeros((2, 2), np.float16)})
    with pytest.raises(MaskFormatError, match="without the format entry"):
        mask_file.decode(plain)
    weights = safetensors.numpy.save({"weight": np.zeros((2, 2), np.float32)}, {"format": "pt"})
    with pytest.raises(MaskFormatError, match="dtype 'F32'"):
        mask_file.decode(weights)


def test_an_unknown_format_version_is_refused() -> None:
    data = rewritten(mask_file.encode(GOLDEN), metadata={"format": "masquerade.mask/2"})
    with pytest.raises(MaskFormatError, match=r"'masquerade.mask/2'.*reads 'masquerade.mask/1'"):
        mask_file.decode(data)


def test_a_mask_for_another_base_is_refused() -> None:
    data = mask_file.encode(GOLDEN)
    with pytest.raises(BaseMismatch, match="another base") as refused:
        mask_file.decode(data, base="aa" * 32, shape=FFNShape(9, 9, 9))
    assert (refused.value.expected, refused.value.found) == ("aa" * 32, "00ff" * 16)


@pytest.mark.parametrize("shape", [FFNShape(3, 11, 2), FFNShape(2, 12, 2), FFNShape(2, 11, 4)])
def test_a_mask_of_another_shape_is_refused(shape: FFNShape) -> None:
    with pytest.raises(MaskShapeError, match="the mask is for 2 layers x 11 neurons, hidden size 2"):
        mask_file.decode(mask_file.encode(GOLDEN), base="00ff" * 16, shape=shape)


@pytest.mark.parametrize("redigest", [True, False])
def test_an_empty_layer_is_refused(redigest: bool) -> None:
    bits = GOLDEN.subnetwork.mask.bits.copy()
    bits[1] = 0
    with pytest.raises(EmptyLayer) as refused:
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), mask=bits, redigest=redigest))
    assert refused.value.layer == 1


@pytest.mark.parametrize("redigest", [True, False])
def test_a_set_padding_bit_is_refused(redigest: bool) -> None:
    bits = GOLDEN.subnetwork.mask.bits.copy()
    bits[0, 1] |= 0x80
    with pytest.raises(MaskIndexError, match="layer 0 keeps neuron 15, and the last is 10"):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), mask=bits, redigest=redigest))


@pytest.mark.parametrize("redigest", [True, False])
@pytest.mark.parametrize("tensor", ["gain", "bias"])
def test_a_value_that_is_not_finite_is_refused(tensor: str, redigest: bool) -> None:
    array = getattr(GOLDEN.subnetwork, tensor).copy()
    array[1, 0] = np.inf
    with pytest.raises(NonFiniteMask, match=f"{tensor} of layer 1"):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), redigest=redigest, **{tensor: array}))


def test_layers_of_unequal_count_are_refused() -> None:
    bits = GOLDEN.subnetwork.mask.bits.copy()
    bits[1, 0] = 0b11111
    with pytest.raises(MaskShapeError, match="layer 0 keeps 3, layer 1 keeps 6"):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), mask=bits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": np.ones((2, 3), np.uint8)}, r"uint8 \[layers, 2\]"),
        ({"mask": np.ones((3, 2), np.uint8)}, "3 layers, its metadata say 2"),
        ({"mask": np.ones((2, 2), np.float16)}, "this is float16"),
        ({"gain": np.ones((2, 4), np.float16)}, r"gain is float16 \[2, 3\]"),
        ({"gain": np.ones((2, 3), np.uint8)}, "gain is float16"),
        ({"bias": np.ones((2, 3), np.float16)}, r"bias is float16 \[2, 2\]"),
        ({"metadata": {"kept": "4"}, "gain": None}, "keeps 3 neurons a layer, its metadata say 4"),
    ],
)
def test_tensors_that_contradict_the_metadata_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskShapeError, match=message):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), **changes))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"persona": None}, "lack persona"),
        ({"colour": "red"}, "unknown entries: colour"),
        ({"kept": "03"}, "kept is '03'"),
        ({"kept": "0"}, "kept is '0'"),
        ({"version": "-1"}, "version is '-1'"),
        ({"version": "9" * 5000}, "version is"),
        ({"settings": "{"}, "settings are not JSON"),
        ({"settings": "[]"}, "not a JSON object"),
        ({"settings": '{"loss": NaN}'}, "settings are not JSON"),
        ({"settings": '{"loss": 1e999}'}, "settings are not JSON"),
        ({"sparsity": "0.5"}, "sparsity is '0.5', the mask's 0.727273"),
        ({"sparsity": "nan"}, "sparsity is 'nan'"),
        ({"sparsity": "much"}, "sparsity is 'much'"),
        ({"attached": '[["lora", "12"]]'}, "attached"),
        ({"attached": "{}"}, "attached"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(metadata: dict[str, str | None], message: str) -> None:
    with pytest.raises(MaskFormatError, match=message):
        mask_file.decode(rewritten(mask_file.encode(GOLDEN), metadata=metadata))


def test_unknown_and_missing_tensors_are_refused() -> None:
    data = mask_file.encode(GOLDEN)
    with pytest.raises(MaskFormatError, match="unknown tensors: scale"):
        mask_file.decode(rewritten(data, scale=np.ones(1, np.float16)))
    with pytest.raises(MaskFormatError, match="no tensor named mask"):
        mask_file.decode(rewritten(data, mask=None))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"__metadata__":{"format":1}}', "metadata are not strings"),
        ('{"__metadata__":{"format":"\\ud800"}}', "damaged"),
        ('{"a":1}', "lacks its dtype"),
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', "does not fill"),
        ('{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', "no usable shape"),
        ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "no usable shape"),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', "begins at byte 1, not 0"),
        ('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', "truncated"),
        ('{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', "dtype"),
        ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', "given twice"),
    ],
)
def test_a_damaged_safetensors_header_is_refused(header: str, message: str) -> None:
    raw = header.encode()
    with pytest.raises(MaskFormatError, match=message):
        mask_file.decode(len(raw).to_bytes(8, "little") + raw + b"\0\0")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MaskFormatError):
        mask_file.decode(data)


# Files


def test_a_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask_file.write(path, GOLDEN)
    assert mask_file.read(path, base="00ff" * 16, shape=FFNShape(2, 11, 2)) == GOLDEN
    assert list(tmp_path.iterdir()) == [path]
