"""A tiny base with its model, sub-networks and examples of one persona on it; makes helpers here importable."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages

from masquerade_engine.base import Base, load_base
from masquerade_engine.reference import reference_logits
from masquerade_engine.seams import persona_ffns
from masquerade_masks import Attached, Mask, SubNetwork, round_kept
from masquerade_masks.attached import PARTS, full_name, lora_name
from masquerade_pruner.examples import Example


@pytest.fixture(scope="session")
def tiny_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tiny_base_dir), cache_dir=tmp_path_factory.mktemp("cache"), dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def tiny_model(tiny_base: Base) -> torch.nn.Module:
    return tiny_base.build_model()


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    """`make_examples(count, seed=0)`: random tokens behind one shared prefix, of many lengths."""

    def make(count: int, seed: int = 0) -> list[Example]:
        rng = random.Random(seed)
        prefix = [rng.randrange(256) for _ in range(23)]
        return [_random_example(rng, prefix, index) for index in range(count)]

    return make


def _random_example(rng: random.Random, prefix: list[int], index: int) -> Example:
    question = [rng.randrange(256) for _ in range(rng.choice((1, 5, 9, 40)))]
    answer = [rng.randrange(256) for _ in range(rng.choice((1, 7, 16)))]
    return Example(
        id=str(index),
        question_id=str(index),
        topic="any",
        split="train",
        question="",
        answer_text="",
        sensitivity=None,
        prompt=(*prefix, *question),
        answer=tuple(answer),
        ended=False,
    )


@pytest.fixture(scope="session")
def make_subnetwork(make_attached: Callable[..., Attached]) -> Callable[..., SubNetwork]:
    """`make_subnetwork(base, gain=False, bias=False, kind=None)`: a random half of the neurons, and random extras."""

    def make(base: Base, *, gain: bool = False, bias: bool = False, kind: str | None = None) -> SubNetwork:
        rng = np.random.default_rng(0)
        shape = base.shape
        kept = round_kept(shape.intermediate_size, 0.5)
        indices = np.stack([rng.permutation(shape.intermediate_size)[:kept] for _ in range(shape.num_layers)])
        return SubNetwork(
            base.fingerprint,
            shape,
            Mask.from_kept_indices(np.sort(indices, axis=1).astype(np.int32), shape.intermediate_size),
            gain=rng.uniform(0.5, 1.5, (shape.num_layers, kept)).astype(np.float16) if gain else None,
            bias=rng.normal(0, 0.1, (shape.num_layers, shape.hidden_size)).astype(np.float16) if bias else None,
            weights=None if kind is None else make_attached(kind, shape, kept),
        )

    return make


@pytest.fixture(scope="session")
def persona_logits() -> Callable[..., torch.Tensor]:
    """`persona_logits(base, subnetwork, token_ids)` by the reference, on the base's full-size weights."""
    return _persona_logits


@torch.no_grad()
def _persona_logits(base: Base, subnetwork: SubNetwork, token_ids: torch.Tensor) -> torch.Tensor:
    model = base.build_model(torch.float32)
    weights, kept = subnetwork.weights, torch.from_numpy(subnetwork.mask.kept_indices()).long()
    for layer, ffn in enumerate(persona_ffns(model) if weights is not None else ()):
        for part in PARTS:
            weight = ffn.get_submodule(part).get_parameter("weight")
            if weights.kind == "lora":
                a, b = (torch.from_numpy(weights.float32(lora_name(layer, part, side))) for side in "AB")
                weight += weights.scale * (b @ a)
            else:
                own = torch.from_numpy(weights.float32(full_name(layer, part)))
                weight.index_copy_(1 if part == "down_proj" else 0, kept[layer], own)
    biases = subnetwork.biases()
    coefficients = torch.from_numpy(subnetwork.coefficients())
    return reference_logits(model, token_ids, coefficients, None if biases is None else torch.from_numpy(biases))
