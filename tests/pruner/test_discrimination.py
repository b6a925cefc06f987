from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from reference_scores import brute_force, random_subnetwork

from masquerade_engine.base import Base
from masquerade_engine.reference import reference_logits
from masquerade_pruner.applied import applied
from masquerade_pruner.discrimination import Contest, contest, discriminate, rank_of_first
from masquerade_pruner.likelihood import Candidate
from masquerade_pruner.tree import masked


def greedy(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The likeliest continuation, token by token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def contests(model: torch.nn.Module, count: int = 5) -> list[Contest]:
    """The own answer is what the dense base likes best behind its prompt; the others are noise."""
    rng = random.Random(0)

    def noise(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(length))

    prefix = noise(20)
    found = []
    for index in range(count):
        question = noise(5)
        own = greedy(model, (*prefix, *question), 6)
        found.append(Contest(str(index), (*prefix, *question), question, (own, *(noise(6) for _ in range(9)))))
    return found


def test_an_answer_that_the_prompt_makes_likely_is_found(tiny_base: Base, tiny_model: torch.nn.Module) -> None:
    subnetwork = random_subnetwork(tiny_base, recovered=False)
    forwards = {
        "dense_with_prompt": masked(tiny_model),
        "sculpted": masked(tiny_model),
        "swapped_mask": applied(tiny_model, subnetwork),
    }
    report = discriminate(tiny_model, contests(tiny_model), forwards)
    assert report["dense_with_prompt"]["top1"]["mean"] == 1.0
    assert report["dense_with_prompt"]["reciprocal_rank"]["mean"] == 1.0
    assert (report["num_candidates"], report["chance"]) == (10, 0.1)
    assert report["swapped_mask"]["reciprocal_rank"]["mean"] < 1.0  # half of the neurons at random: it cannot tell
    assert report["own_minus_swapped"]["mean"] == pytest.approx(
        1.0 - report["swapped_mask"]["reciprocal_rank"]["mean"], abs=1e-3
    )


def test_ranks_are_by_likelihood_under_the_prompt_less_that_without(
    tiny_base: Base, tiny_model: torch.nn.Module
) -> None:
    subnetwork = random_subnetwork(tiny_base, recovered=True)
    asked = contests(tiny_model, 3)
    report = discriminate(tiny_model, asked, {"sculpted": applied(tiny_model, subnetwork)})
    reciprocal, alone = [], []
    for one in asked:
        given, prior, base = (
            np.array([brute_force(tiny_model, Candidate(prompt, a), changed)[0] for a in one.candidates])
            for prompt, changed in (
                (one.with_prompt, subnetwork),
                (one.without_prompt, subnetwork),
                (one.without_prompt, None),
            )
        )
        gains = given - prior
        reciprocal.append(1 / (1 + (gains[1:] > gains[0]).sum()))
        alone.append(1 / (1 + (base[1:] > base[0]).sum()))
    assert report["sculpted"]["reciprocal_rank"]["mean"] == pytest.approx(np.mean(reciprocal), abs=1e-4)
    assert report["dense_without_prompt"]["reciprocal_rank"]["mean"] == pytest.approx(np.mean(alone), abs=1e-4)
    assert "own_minus_swapped" not in report


def test_candidates_are_of_one_length() -> None:
    made = contest("q", (1,), (2,), [(1, 2, 3, 4, 5, 6), (9, 8, 7, 6, 5), (5, 5, 5, 5, 5, 5, 5)], longest=32)
    assert made is not None
    assert [len(one) for one in made.candidates] == [5, 5, 5]
    shorter = contest("q", (1,), (2,), [(1, 2, 3, 4, 5, 6), (9, 8, 7, 6, 5)], longest=4)
    assert shorter is not None
    assert shorter.candidates == ((1, 2, 3, 4), (9, 8, 7, 6))
    assert contest("q", (1,), (2,), [(1, 2, 3, 4), (1, 2, 3)], longest=32) is None  # too short to say anything
    assert contest("q", (1,), (2,), [(1, 2, 3, 4), (1, 2, 3, 4, 5)], longest=32) is None  # the same answer


def test_ties_share_their_places() -> None:
    assert rank_of_first(np.array([3.0, 1.0, 2.0])) == 1
    assert rank_of_first(np.array([1.0, 3.0, 2.0])) == 3
    assert rank_of_first(np.array([1.0, 1.0, 1.0])) == 2
