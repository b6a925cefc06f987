"""Scores against their definitions, by hand in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from masquerade_pruner.baselines.griffin import persona_prompt, prompt_statistic
from masquerade_pruner.baselines.llm_pruner import taylor_importance
from masquerade_pruner.importance import activation_importance, fisher_importance

Case = Any  # of conftest.py
BATCHES = [3, 16]  # of seven examples: several passes, the last not full; and one


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=1e-7, rtol=2e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_wanda(case: Case, batch: int) -> None:
    wanted = []
    for index, layer in enumerate(case.exact.model.layers):
        read = case.rows(case.inputs_of(f"model.layers.{index}.mlp.down_proj"), batch)
        wanted.append(read.square().mean(dim=0).sqrt() * layer.mlp.down_proj.weight.norm(dim=0))
    _close(activation_importance(case.model, case.examples, batch=batch), torch.stack(wanted))


@pytest.mark.parametrize("batch", BATCHES)
def test_fisher(case: Case, batch: int) -> None:
    shape = (len(case.exact.model.layers), case.exact.config.intermediate_size)
    squares = []
    for start in range(0, len(case.examples), batch):
        ones = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(case.cross_entropy(case.examples[start : start + batch], ones), ones)
        squares.append(gradient.square())
    _close(fisher_importance(case.model, case.examples, batch=batch), torch.stack(squares).mean(dim=0))


@pytest.mark.parametrize("batch", BATCHES)
def test_llm_pruner(case: Case, batch: int) -> None:
    wanted = []
    for layer in case.exact.model.layers:
        weights = [getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")]
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(case.cross_entropy(case.examples), weights)
        gate, up, down = ((weight * one).detach().abs() for weight, one in zip(weights, gradients, strict=True))
        wanted.append(gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0))
        for weight in weights:
            weight.requires_grad_(False)
    _close(taylor_importance(case.model, case.examples, batch=batch), torch.stack(wanted))


def test_griffin(case: Case) -> None:
    prompt = persona_prompt(case.examples)
    assert len(prompt) >= 23  # what make_examples shares
    assert all(one.prompt[: len(prompt)] == prompt for one in case.examples)
    wanted = []
    for index in range(len(case.exact.model.layers)):
        (read,) = case.inputs_of(f"model.layers.{index}.mlp.down_proj", [prompt])
        wanted.append((read / read.norm(dim=1, keepdim=True)).norm(dim=0))
    _close(prompt_statistic(case.model, prompt), torch.stack(wanted))


def test_griffin_of_one_token(case: Case) -> None:
    statistic = prompt_statistic(case.model, [9])
    torch.testing.assert_close(statistic.norm(dim=1), torch.ones(len(statistic)))  # one unit vector a layer


def test_griffin_refuses_examples_that_share_nothing(case: Case) -> None:
    first, second = case.examples[:2]
    with pytest.raises(ValueError, match="share no first token"):
        persona_prompt([first, replace(second, prompt=((first.prompt[0] + 1) % 256, *second.prompt[1:]))])
