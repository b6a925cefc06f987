"""The likelihood of answers that others wrote."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from masquerade_pruner.evaluation import likelihood
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.tree import TreeContext, head_weight, masked, plant, run_tree


def by_hand(model: torch.nn.Module, one: Example, mask: torch.Tensor | None) -> float:
    """One example alone, from all of its logits."""
    tokens = (*one.prompt, *one.answer)
    tree = plant([tokens], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = run_tree(model, tree, TreeContext(tree, mask)) @ head_weight(model).T
    predicting = logits[len(one.prompt) - 1 : len(tokens) - 1]
    return float(F.cross_entropy(predicting, torch.tensor(one.answer)))


def test_nll_is_each_answers_mean_cross_entropy(
    tiny_model: torch.nn.Module, make_examples: Callable[..., list[Example]]
) -> None:
    examples = make_examples(21, seed=3)  # two batches, put back in order
    held_out = HeldOut(tiny_model, examples)
    mask = (torch.rand(3, 96, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    for changed in (None, mask):
        found = held_out.nll(masked(tiny_model, changed))
        expected = [by_hand(tiny_model, one, changed) for one in examples]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held_out.dense_nll(), held_out.nll(masked(tiny_model)))


def test_gap_closed_compares_with_the_strongest_baseline(
    tiny_model: torch.nn.Module, make_examples: Callable[..., list[Example]]
) -> None:
    examples = make_examples(10, seed=4)
    held_out = HeldOut(tiny_model, examples)
    generator = torch.Generator().manual_seed(2)
    forwards = [masked(tiny_model, (torch.rand(3, 96, generator=generator) > 0.5).float()) for _ in range(3)]
    ours, one, other = (float(held_out.nll(forward).mean()) for forward in forwards)
    found = likelihood(held_out, examples, forwards[0], {"one": forwards[1], "other": forwards[2]}, "other")["all"]
    assert found["nll"]["mean"] == pytest.approx(ours, abs=1e-4)
    assert found["baseline_nll"]["one"]["mean"] == pytest.approx(one, abs=1e-4)
    assert found["gap_closed"]["mean"] == pytest.approx(1 - ours / other, abs=1e-4)
    assert found["dense_nll"]["mean"] == pytest.approx(float(held_out.dense_nll().mean()), abs=1e-4)
