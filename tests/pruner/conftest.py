"""A tiny base with its model, and examples of one persona on it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages

from masquerade_engine.base import Base, load_base
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
