"""A tiny base, random sub-networks of it, and teacher-forced logits out of the engine's own path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from masquerade_engine import Base, Engine, PersonaFunction, Request, SamplingParams, load_base
from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.sequence import Batch, Chunk
from masquerade_engine.sequence import Sequence as EngineSequence
from masquerade_masks import Attached, Mask, SubNetwork
from masquerade_masks.attached import Kind


def _make_function(
    make_attached: Callable[..., Attached],
    base: Base,
    seed: int,
    *,
    sparsity: float = 0.5,
    gain: bool = False,
    bias: bool = False,
    cast: str = "town",
    attached: Kind | None = None,
) -> PersonaFunction:
    shape = base.shape
    generator = np.random.default_rng(seed)
    kept = max(1, round(shape.intermediate_size * (1 - sparsity)))
    indices = generator.random((shape.num_layers, shape.intermediate_size)).argsort(axis=1)[:, :kept]
    subnetwork = SubNetwork(
        base.fingerprint,
        shape,
        Mask.from_kept_indices(indices, shape.intermediate_size),
        gain=generator.normal(1, 0.2, (shape.num_layers, kept)).astype(np.float16) if gain else None,
        bias=generator.normal(0, 0.2, (shape.num_layers, shape.hidden_size)).astype(np.float16) if bias else None,
        weights=None if attached is None else make_attached(attached, shape, kept, seed=seed),
    )
    return PersonaFunction(subnetwork.digest, cast, subnetwork)


def _forced_logits(
    engine: Engine, function: PersonaFunction, tokens: Sequence[int], stops: Sequence[int], slot: int = 0
) -> torch.Tensor:
    request = Request("forced", tuple(tokens), function, SamplingParams(max_tokens=1))
    sequence = EngineSequence(request, Detokenizer(lambda ids: ""), slot=slot)
    rows, start = [], 0
    for stop in stops:
        rows.append(engine.runner.logits(Batch((Chunk(sequence, start, stop - start, True),)))[0])
        start = stop
    return torch.stack(rows)


@pytest.fixture(scope="session")
def make_function(make_attached: Callable[..., Attached]) -> Callable[..., PersonaFunction]:
    """`make_function(base, seed, sparsity=, gain=, bias=, cast="town", attached="lora")`: a random sub-network."""
    return partial(_make_function, make_attached)


@pytest.fixture(scope="session")
def forced_logits() -> Callable[..., torch.Tensor]:
    """`forced_logits(engine, function, tokens, stops, slot=0)`: logits `[len(stops), vocab]` after each stop's tokens.

    Each step computes what lies between two stops, so stops that are one apart are decoding.
    """
    return _forced_logits


@pytest.fixture(scope="session")
def tiny_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The session's tiny Llama in float32."""
    return load_base(str(tiny_base_dir), cache_dir=tmp_path_factory.mktemp("cache"), dtype="fp32")


@pytest.fixture(scope="session")
def real_base(pytestconfig: pytest.Config) -> Base:
    """The bundled model in float32, dequantised once into pytest's own cache."""
    return load_base(cache_dir=pytestconfig.cache.mkdir("bases"), dtype="fp32")


@pytest.fixture(scope="session")
def base_function(tiny_base: Base) -> PersonaFunction:
    """The unpruned tiny base."""
    return PersonaFunction(f"base:{tiny_base.fingerprint}", "town")


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., tuple[int, ...]]:
    """`prompt_of(seed, length=24)`: random tokens of the byte alphabet."""

    def make(seed: int, length: int = 24) -> tuple[int, ...]:
        return tuple(int(token) for token in np.random.default_rng(seed).integers(0, 250, length))

    return make
