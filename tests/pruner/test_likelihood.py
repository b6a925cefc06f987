"""Scores of whole answers, and stored sub-networks as changes of the base, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference_scores import brute_force, random_subnetwork

from masquerade_engine.base import Base
from masquerade_engine.reference import reference_logits
from masquerade_engine.seams import persona_ffns
from masquerade_masks import Attached, SettingError, SubNetwork
from masquerade_masks.attached import PARTS, expected_shapes, full_name, lora_name
from masquerade_pruner.applied import applied
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.likelihood import Candidate, score
from masquerade_pruner.tree import masked


def candidates(model: torch.nn.Module) -> list[Candidate]:
    """Many answers to few prompts: equal, nested and shared beginnings, one of them the greedy one."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(256, (count,), generator=generator).tolist())

    first, second = tokens(20), tokens(7)
    shared = tokens(3)
    greedy = int(reference_logits(model, torch.tensor([first]))[0, -1].argmax())
    return [
        Candidate(first, (*shared, 5)),
        Candidate(second, tokens(9)),
        Candidate(first, shared),
        Candidate(first, (*shared, 6, 7)),
        Candidate(first, (greedy,)),
        Candidate(second, tokens(1)),
        *(Candidate(first, tokens(4)) for _ in range(40)),
    ]


@pytest.mark.parametrize("recovered", [False, True])
def test_scores_are_what_each_answer_gets_alone(tiny_base: Base, tiny_model: torch.nn.Module, recovered: bool) -> None:
    subnetwork = random_subnetwork(tiny_base, recovered=recovered)
    asked = candidates(tiny_model)
    batches: list[None] = []
    for forward, changed in ((masked(tiny_model), None), (applied(tiny_model, subnetwork), subnetwork)):
        found = score(tiny_model, asked, forward, between=lambda: batches.append(None))
        for index, one in enumerate(asked):
            wanted, greedy = brute_force(tiny_model, one, changed)
            assert float(found.log_likelihood[index]) == pytest.approx(wanted, abs=2e-4)
            assert bool(found.greedy[index]) == greedy
    assert len(batches) == 4  # two batches a forward
    assert bool(score(tiny_model, asked, masked(tiny_model)).greedy[4])


def test_examples_of_one_prompt_alone_are_told_apart(tiny_model: torch.nn.Module) -> None:
    """Where all branches share a whole prompt, each still predicts its own answer's first token from it."""
    asked = [Candidate((1, 2, 3, 4), answer) for answer in ((9, 8, 7), (30, 31, 32), (30, 40))]
    found = HeldOut(tiny_model, asked).dense_nll()
    for index, one in enumerate(asked):
        wanted, _ = brute_force(tiny_model, one, None)
        assert float(found[index]) == pytest.approx(-wanted / len(one.answer), abs=1e-4)


def test_gains_and_biases_change_what_is_measured(
    tiny_base: Base, tiny_model: torch.nn.Module, make_examples: Callable[..., list[Example]]
) -> None:
    held_out = HeldOut(tiny_model, make_examples(4))
    plain, recovered = (
        held_out.divergence(applied(tiny_model, random_subnetwork(tiny_base, recovered=one))).kl
        for one in (False, True)
    )
    assert float((plain - recovered).abs().min()) > 1e-4


def attached(base: Base, kind: str, kept: int) -> Attached:
    """Random weights that change much."""
    rng = np.random.default_rng(5)
    shapes = expected_shapes(kind, base.shape, kept, 4 if kind == "lora" else None)
    tensors = {name: rng.normal(0, 0.15, shape).astype(np.float32) for name, shape in shapes}
    return Attached(kind, tensors, 8.0, 4) if kind == "lora" else Attached(kind, tensors)


def changed_model(base: Base, subnetwork: SubNetwork) -> torch.nn.Module:
    """The base with the attached weights written into its own, for the reference to run under the mask."""
    model, weights, kept = base.build_model(), subnetwork.weights, subnetwork.mask.kept_indices()
    for layer, ffn in enumerate(persona_ffns(model)):
        rows = torch.from_numpy(kept[layer]).long()
        for part in PARTS:
            weight = ffn.get_parameter(f"{part}.weight")
            if weights.kind == "lora":
                a, b = (torch.from_numpy(weights.float32(lora_name(layer, part, side))) for side in "AB")
                weight += 2.0 * (b @ a)  # alpha / rank
            elif part == "down_proj":
                weight[:, rows] = torch.from_numpy(weights.float32(full_name(layer, part)))
            else:
                weight[rows] = torch.from_numpy(weights.float32(full_name(layer, part)))
    return model


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attached_weights_are_scored_as_they_are_served(
    tiny_base: Base, tiny_model: torch.nn.Module, kind: str
) -> None:
    plain = random_subnetwork(tiny_base, recovered=True)
    weights = attached(tiny_base, kind, plain.mask.kept)
    subnetwork = SubNetwork(plain.base, plain.shape, plain.mask, plain.gain, plain.bias, weights=weights)
    oracle = changed_model(tiny_base, subnetwork)
    asked = candidates(tiny_model)[:6]
    found = score(tiny_model, asked, applied(tiny_model, subnetwork)).log_likelihood
    without = score(tiny_model, asked, applied(tiny_model, plain)).log_likelihood
    for index, one in enumerate(asked):
        assert float(found[index]) == pytest.approx(brute_force(oracle, one, subnetwork)[0], abs=1e-3)
    assert float((found - without).abs().max()) > 0.1


def test_attached_weights_that_are_not_loaded_are_refused(tiny_base: Base, tiny_model: torch.nn.Module) -> None:
    plain = random_subnetwork(tiny_base, recovered=False)
    named = SubNetwork(plain.base, plain.shape, plain.mask, attached=(("lora", "0" * 64),))
    with pytest.raises(SettingError, match="lora weights are not at hand"):
        applied(tiny_model, named)
