"""Digests over named content: one way to feed a hash, so that no two contents read alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt


def digest_of_parts(parts: Iterable[tuple[str, bytes | npt.NDArray[Any]]]) -> str:
    """Sha256, lower-case hex, over every part's name and content, each after its length in bytes (little-endian u64).

    An array's content is its raw values, C-order and little-endian.
    """
    sha = hashlib.sha256()
    for name, content in parts:
        raw = content if isinstance(content, bytes) else _raw(content)
        for field in (name.encode(), raw):
            sha.update(len(field).to_bytes(8, "little"))
            sha.update(field)
    return sha.hexdigest()


def _raw(array: npt.NDArray[Any]) -> memoryview:
    """The array's bytes, not copied where they lie as they are hashed."""
    stored = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return stored.reshape(-1).view(np.uint8).data
