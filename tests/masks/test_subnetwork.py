from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from masquerade_masks import FFNShape, Mask, MaskFormatError, MaskShapeError, NonFiniteMask, SubNetwork

SHAPE = FFNShape(num_layers=2, intermediate_size=11, hidden_size=2)
MASK = Mask.from_kept_indices([[0, 3, 10], [1, 2, 8]], 11)
GAIN = np.array([[1, 0.5, 2], [0.25, -1, 1.5]], dtype=np.float16)
BIAS = np.array([[0, 0.125], [-0.5, 3]], dtype=np.float16)


def golden(**changes: object) -> SubNetwork:
    whole = SubNetwork(base="00ff" * 16, shape=SHAPE, mask=MASK, gain=GAIN, bias=BIAS)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_the_digest_is_this_one() -> None:
    assert golden().digest == "aa18faa9efa54c7c8524efa3bc683f5d9a9652ec8dddefb3fc1f9468aabfea8f"
    assert golden(gain=None, bias=None).digest == "dee61310208b95199c3ef090278af85fbf5fef781f30d4b6fb3c04504552dbad"


def test_the_digest_is_sha256_over_length_prefixed_parts() -> None:
    parts = [
        (b"format", b"masquerade.mask/1"),
        (b"base", b"00ff" * 16),
        (b"shape", struct.pack("<3Q", 2, 11, 2)),
        (b"mask", bytes([0b00001001, 0b100, 0b00000110, 0b1])),
        (b"gain", struct.pack("<6e", 1, 0.5, 2, 0.25, -1, 1.5)),
        (b"bias", struct.pack("<4e", 0, 0.125, -0.5, 3)),
        (b"attached:lora", b"12" * 32),
    ]
    stream = b"".join(struct.pack("<Q", len(field)) + field for part in parts for field in part)
    assert golden(attached=(("lora", "12" * 32),)).digest == hashlib.sha256(stream).hexdigest()


def test_the_digest_changes_with_everything_that_changes_the_function() -> None:
    digests = [
        golden().digest,
        golden(base="00fe" * 16).digest,
        golden(mask=Mask.from_kept_indices([[0, 3, 9], [1, 2, 8]], 11)).digest,
        golden(gain=None).digest,
        golden(bias=None).digest,
        golden(gain=None, bias=None).digest,
        golden(gain=-GAIN).digest,
        golden(bias=BIAS + np.float16(1)).digest,
        golden(shape=FFNShape(2, 11, 3), bias=None).digest,
        golden(attached=(("lora", "12" * 32),)).digest,
        golden(attached=(("full", "12" * 32),)).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_the_order_of_attached_weights_does_not_matter() -> None:
    one, other = ("lora", "12" * 32), ("full", "34" * 32)
    assert golden(attached=(one, other)) == golden(attached=(other, one))
    with pytest.raises(MaskFormatError, match="twice"):
        golden(attached=(one, one))


def test_coefficients_are_gains_where_kept_and_0_elsewhere() -> None:
    coefficients = golden().coefficients()
    assert coefficients.dtype == np.float32
    assert coefficients.tolist() == [
        [1, 0, 0, 0.5, 0, 0, 0, 0, 0, 0, 2],
        [0, 0.25, -1, 0, 0, 0, 0, 0, 1.5, 0, 0],
    ]
    assert np.array_equal(golden(gain=None).coefficients(), MASK.to_dense())


def test_biases_are_float32_or_absent() -> None:
    biases = golden().biases()
    assert biases is not None
    assert biases.dtype == np.float32
    assert biases.tolist() == BIAS.tolist()
    assert golden(bias=None).biases() is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["gain", "bias"])
def test_values_that_are_not_finite_are_refused(tensor: str, value: float) -> None:
    array = (GAIN if tensor == "gain" else BIAS).copy()
    array[1, 1] = value
    with pytest.raises(NonFiniteMask) as refused:
        golden(**{tensor: array})
    assert (refused.value.tensor, refused.value.layer) == (tensor, 1)


def test_other_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(MaskShapeError, match=r"gain is float16 \[2, 3\]; this is float32"):
        golden(gain=GAIN.astype(np.float32))
    with pytest.raises(MaskShapeError, match=r"gain is float16 \[2, 3\]; this is float16 \[2, 2\]"):
        golden(gain=GAIN[:, :2])
    with pytest.raises(MaskShapeError, match="bias"):
        golden(bias=GAIN)
    with pytest.raises(MaskShapeError, match="the base 3 layers"):
        golden(shape=FFNShape(3, 11, 2))


def test_gains_are_a_read_only_copy() -> None:
    gain = GAIN.copy()
    subnetwork = golden(gain=gain)
    digest = subnetwork.digest
    gain[:] = 0
    assert subnetwork.gain is not None
    assert np.array_equal(subnetwork.gain, GAIN)
    assert subnetwork.digest == digest
    with pytest.raises(ValueError, match="read-only"):
        subnetwork.gain[0, 0] = 0


def test_sub_networks_are_equal_where_their_digests_are(make_subnetwork: Callable[..., SubNetwork]) -> None:
    assert make_subnetwork(gain=True) == make_subnetwork(gain=True)
    assert hash(make_subnetwork()) == hash(make_subnetwork())
    assert make_subnetwork() != make_subnetwork(seed=1)
    assert make_subnetwork() != "a sub-network"
