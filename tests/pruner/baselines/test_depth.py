"""Block influence, and what is left when blocks are dropped."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masquerade_pruner.baselines import METHODS, Setting
from masquerade_pruner.baselines.depth import block_influence, closest_number, without_layers
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import head_weight, masked

Case = Any  # of conftest.py


@pytest.mark.parametrize("batch", [3, 16])
def test_block_influence(case: Case, batch: int) -> None:
    found = block_influence(case.model, case.examples, batch=batch)
    layers = range(len(case.exact.model.layers))
    entering = [case.rows(case.inputs_of(f"model.layers.{index}"), batch) for index in layers]
    entering.append(case.rows(case.inputs_of("model.norm"), batch))
    for index in layers:
        between = case.rows(case.inputs_of(f"model.layers.{index}.post_attention_layernorm"), batch)
        assert float(found.layers[index]) == pytest.approx(_influence(entering[index], entering[index + 1]), abs=1e-6)
        assert float(found.ffns[index]) == pytest.approx(_influence(between, entering[index + 1]), abs=1e-6)


def _influence(before: torch.Tensor, after: torch.Tensor) -> float:
    cosines = (before * after).sum(dim=1) / (before.norm(dim=1) * after.norm(dim=1))
    return float(1 - cosines.mean())


@pytest.mark.parametrize("dropped", [[], [0], [1, 2]])
def test_a_dropped_layer_is_one_that_gives_back_what_it_reads(case: Case, dropped: list[int]) -> None:
    planted = plant_examples(case.examples, case.model)
    states = masked(without_layers(case.model, dropped))(planted.tree)[planted.rows]
    logits = states @ head_weight(case.model).T
    with ExitStack() as hooks:
        for index in dropped:
            layer = case.exact.model.layers[index]
            hooks.callback(layer.register_forward_hook(lambda _m, inputs, _output: inputs[0]).remove)
        for index, one in enumerate(case.examples):
            wanted = case.logits((*one.prompt, *one.answer))[len(one.prompt) - 1 : -1]
            torch.testing.assert_close(logits[planted.owners == index], wanted.float(), atol=2e-4, rtol=0)


@given(wanted=st.integers(0, 10_000), size=st.integers(1, 700), most=st.integers(1, 40))
def test_the_number_of_blocks_is_the_closest(wanted: int, size: int, most: int) -> None:
    best = min(range(most + 1), key=lambda number: (abs(number * size - wanted), number))
    assert closest_number(wanted, size, most) == best


@pytest.mark.parametrize("method", ["depth-layers", "depth-ffns"])
def test_the_least_influential_blocks_go_and_are_counted(case: Case, method: str) -> None:
    blocks = [layer if method == "depth-layers" else layer.mlp for layer in case.model.model.layers]
    size = sum(parameter.numel() for parameter in blocks[0].parameters())
    wanted = Setting(case.model, case.examples, kept=20).num_dropped
    found = METHODS[method](Setting(case.model, case.examples, kept=20))
    assert found.num_dropped % size == 0
    assert abs(found.num_dropped - wanted) <= size / 2
    influence = block_influence(case.model, case.examples)
    least = (influence.layers if method == "depth-layers" else influence.ffns).argsort()
    gone = least[: found.num_dropped // size].tolist()
    assert gone
    tree = plant_examples(case.examples, case.model).tree
    if method == "depth-layers":
        wanted_states = masked(without_layers(case.model, gone))(tree)
    else:
        keep = torch.ones(len(blocks), case.model.config.intermediate_size)
        keep[gone] = 0
        wanted_states = masked(case.model, keep)(tree)
    torch.testing.assert_close(found.forward(tree), wanted_states)
