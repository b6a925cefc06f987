"""Builders of small sub-networks and mask files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import masquerade_masks
from masquerade_masks import FFNShape, Mask, MaskFile, MaskHeader, SubNetwork

# The examples run beside other work on few cores; how long one takes says nothing.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def _subnetwork(
    shape: FFNShape = FFNShape(3, 96, 16),
    kept: int = 64,
    *,
    base: str = "ab" * 32,
    gain: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> SubNetwork:
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(shape.intermediate_size)[:kept] for _ in range(shape.num_layers)])
    return SubNetwork(
        base=base,
        shape=shape,
        mask=Mask.from_kept_indices(indices, shape.intermediate_size),
        gain=rng.normal(1, 0.2, (shape.num_layers, kept)).astype(np.float16) if gain else None,
        bias=rng.normal(0, 0.1, (shape.num_layers, shape.hidden_size)).astype(np.float16) if bias else None,
    )


@pytest.fixture(scope="session")
def make_subnetwork() -> Callable[..., SubNetwork]:
    """`make_subnetwork(shape, kept, base=, gain=, bias=, seed=)` with random content."""
    return _subnetwork


@pytest.fixture(scope="session")
def make_mask_file() -> Callable[..., MaskFile]:
    """`make_mask_file(version=1, **subnetwork arguments)`."""

    def make(version: int = 1, **arguments: object) -> MaskFile:
        header = MaskHeader(
            persona="innkeeper",
            version=version,
            recovery="none",
            prompt_sha256="cd" * 32,
            settings={"seed": 7, "preset": "smoke"},
            created="2026-01-02T03:04:05.678Z",
        )
        return MaskFile(_subnetwork(**arguments), header)  # type: ignore[arg-type]

    return make


@pytest.fixture(params=["write", "fsync"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`full_disk()` lets later `os.write`s (but a first short one) or `os.fsync`s meet a full disk."""

    def fill() -> None:
        real_write = os.write
        written: list[int] = []

        def write(descriptor: int, data: bytes) -> int:
            if written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(real_write(descriptor, bytes(data)[:3]))
            return written[0]

        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, request.param, write if request.param == "write" else fsync)

    return fill


@pytest.fixture
def run_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`run_python(code, *arguments)` starts a process that has the package, its output on a pipe."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        source = str(Path(masquerade_masks.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        started.append(child)
        return child

    yield start
    for child in started:
        with child:
            child.kill()
