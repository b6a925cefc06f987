"""FLAP's metric and its bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from masquerade_pruner.baselines import METHODS
from masquerade_pruner.baselines.flap import compensation, masked_with_bias
from masquerade_pruner.importance import fluctuation, weighted_variance
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import Forward, masked

Case = Any  # of conftest.py


@pytest.mark.parametrize("batch", [3, 16])
def test_the_metric_is_variance_times_squared_column_norm(case: Case, batch: int) -> None:
    statistics = fluctuation(case.model, case.examples, batch=batch)
    found = weighted_variance(case.model, statistics)
    for index, layer in enumerate(case.exact.model.layers):
        read = case.rows(case.inputs_of(f"model.layers.{index}.mlp.down_proj"), batch)
        wanted = read.var(dim=0, correction=0) * layer.mlp.down_proj.weight.square().sum(dim=0)
        torch.testing.assert_close(found[index], wanted, atol=1e-9, rtol=1e-4)
        torch.testing.assert_close(statistics.mean[index], read.mean(dim=0), atol=1e-6, rtol=1e-4)


def test_the_bias_restores_a_layers_mean_output_exactly(case: Case) -> None:
    statistics = fluctuation(case.exact, case.examples)
    mask = torch.ones(statistics.mean.shape)
    mask[0, ::2] = 0  # the first layer alone, so that what the layer reads is the dense base's
    bias = compensation(case.exact, statistics, mask)
    dense = _mean_ffn_output(case, masked(case.exact))
    torch.testing.assert_close(_mean_ffn_output(case, masked_with_bias(case.exact, mask, bias)), dense)
    assert float((_mean_ffn_output(case, masked(case.exact, mask)) - dense).abs().max()) > 1e-3


def _mean_ffn_output(case: Case, forward: Forward) -> torch.Tensor:
    """Of the first layer, over the calibration tokens."""
    seen: list[torch.Tensor] = []
    hook = case.exact.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    forward(plant_examples(case.examples, case.exact).tree)
    hook.remove()
    return seen[0].mean(dim=0)


def test_with_and_without_bias_share_the_mask_and_differ_in_size(case: Case) -> None:
    plain, biased = (METHODS[name](case.setting()) for name in ("flap", "flap-bias"))
    assert torch.equal(plain.mask, biased.mask)
    added = plain.num_dropped - biased.num_dropped
    assert added == len(case.model.model.layers) * case.model.config.hidden_size
    tree = plant_examples(case.examples, case.model).tree
    assert float((plain.forward(tree) - biased.forward(tree)).abs().max()) > 1e-3
