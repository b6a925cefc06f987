"""What holds for every baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from masquerade_pruner.baselines import MASKS, METHODS
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import masked

Case = Any  # of conftest.py


@pytest.mark.parametrize("method", METHODS)
def test_masks_keep_exactly_k_a_layer_and_forwards_give_the_bases_states(case: Case, method: str) -> None:
    setting = case.setting()
    found = METHODS[method](setting)
    assert (found.mask is not None) == (method in MASKS)
    if found.mask is not None:
        layers, intermediate = len(case.model.model.layers), case.model.config.intermediate_size
        assert found.mask.shape == (layers, intermediate)
        assert found.mask.unique().tolist() == [0, 1]
        assert found.mask.sum(dim=1).tolist() == [setting.kept] * layers
    tree = plant_examples(case.examples, case.model).tree
    states, dense = found.forward(tree), masked(case.model)(tree)
    assert states.shape == dense.shape
    assert bool(torch.isfinite(states).all())
    assert float((states - dense).abs().max()) > 1e-3


@pytest.mark.parametrize("method", [name for name in METHODS if name != "slicegpt"])
def test_nothing_dropped_is_the_dense_base(case: Case, method: str) -> None:
    found = METHODS[method](case.setting(kept=case.model.config.intermediate_size))
    divergence = HeldOut(case.model, case.examples).divergence(found.forward)
    assert float(divergence.kl.abs().max()) < 1e-5
    assert found.num_dropped in (0, -len(case.model.model.layers) * case.model.config.hidden_size)  # FLAP's bias


@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_the_base_as_it_was(case: Case, method: str) -> None:
    before = {name: parameter.clone() for name, parameter in case.model.named_parameters()}
    names = [name for name, _ in case.model.named_modules()]
    METHODS[method](case.setting())
    assert [name for name, _ in case.model.named_modules()] == names
    for name, parameter in case.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def test_a_masks_dropped_parameters_are_its_rows_and_columns(case: Case) -> None:
    ffns = [layer.mlp for layer in case.model.model.layers]
    whole = sum(parameter.numel() for ffn in ffns for parameter in ffn.parameters())
    per_neuron = whole / case.model.config.intermediate_size
    assert case.setting(kept=30).num_dropped == (case.model.config.intermediate_size - 30) * per_neuron


def test_random_masks_follow_their_seed(case: Case) -> None:
    first, again, other = (METHODS["random"](case.setting(seed=seed)).mask for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
