"""Scores of whole answers, and stored sub-networks as changes of the base, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference_scores import brute_force, random_subnetwork

from masquerade_engine.base import Base
from masquerade_engine.reference import reference_logits
from masquerade_masks import SettingError, SubNetwork
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


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attached_weights_are_scored_as_they_are_served(
    tiny_base: Base,
    tiny_model: torch.nn.Module,
    make_subnetwork: Callable[..., SubNetwork],
    persona_logits: Callable[..., torch.Tensor],
    kind: str,
) -> None:
    subnetwork = make_subnetwork(tiny_base, gain=True, bias=True, kind=kind)
    asked = candidates(tiny_model)[:6]
    found = score(tiny_model, asked, applied(tiny_model, subnetwork)).log_likelihood
    for index, one in enumerate(asked):
        logits = persona_logits(tiny_base, subnetwork, torch.tensor([[*one.prompt, *one.answer]]))[0]
        rows = logits[len(one.prompt) - 1 : -1].double().log_softmax(-1)
        wanted = float(rows.gather(1, torch.tensor(one.answer)[:, None]).sum())
        assert float(found[index]) == pytest.approx(wanted, abs=1e-3)
    without = make_subnetwork(tiny_base, gain=True, bias=True)
    assert float((found - score(tiny_model, asked, applied(tiny_model, without)).log_likelihood).abs().max()) > 0.01


def test_attached_weights_that_are_not_loaded_are_refused(tiny_base: Base, tiny_model: torch.nn.Module) -> None:
    plain = random_subnetwork(tiny_base, recovered=False)
    named = SubNetwork(plain.base, plain.shape, plain.mask, attached=(("lora", "0" * 64),))
    with pytest.raises(SettingError, match="lora weights are not at hand"):
        applied(tiny_model, named)
