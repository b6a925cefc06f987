"""Soft and noisy top-k masks, and the sparsity schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from estimators import EstimatorLearner, soft_top_k

from masquerade_engine import load_base
from masquerade_pruner.mask_learning import top_k_mask


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kept", [1, 13, 29])
def test_a_soft_mask_sums_to_k_and_hardens_as_it_cools(kept: int, temperature: float) -> None:
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(kept))
    mask = soft_top_k(scores, kept, temperature)
    torch.testing.assert_close(mask.sum(dim=1), torch.full((4,), float(kept)), atol=1e-3, rtol=0)
    assert bool(((mask >= 0) & (mask <= 1)).all())
    hard = torch.zeros_like(scores).scatter_(1, scores.topk(kept).indices, 1.0)
    cold = soft_top_k(scores, kept, 1e-5)
    assert float((cold - hard).abs().mean()) < 0.02


def test_the_soft_masks_gradient_holds_the_sum() -> None:
    scores = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: soft_top_k(one, 3, 0.2), scores, atol=1e-4)
    (gradient,) = torch.autograd.grad(soft_top_k(scores, 3, 0.2).sum(), scores)
    assert float(gradient.abs().max()) < 1e-9  # the sum is k whatever the scores are


@pytest.fixture(scope="module")
def model(tiny_base_dir: Path) -> torch.nn.Module:
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32").build_model()


def _learner(model: torch.nn.Module, **named: object) -> EstimatorLearner:
    scores = torch.rand(3, 96, generator=torch.Generator().manual_seed(1))
    return EstimatorLearner(model, scores, 40, steps=20, learning_rate=0.01, temperature=0.1, **named)


def test_a_gumbel_mask_is_hard_noisy_and_the_same_after_a_restart(model: torch.nn.Module) -> None:
    learner = _learner(model, estimator="gumbel")
    mask = learner.training_mask()
    assert mask.sum(dim=1).tolist() == [40.0] * 3
    torch.testing.assert_close(mask.round(), mask)
    assert not torch.equal(mask.round(), learner.mask())
    restored = _learner(model, estimator="gumbel")
    for one in (learner, restored):
        one.step_number = 7
    torch.testing.assert_close(learner.training_mask(), restored.training_mask(), atol=0, rtol=0)
    assert not torch.equal(learner.training_mask(), mask)
    (gradient,) = torch.autograd.grad((mask * torch.rand(3, 96)).sum(), learner.scores)
    assert bool(gradient.ne(0).any(dim=1).all())


def test_without_an_average_the_mask_is_that_of_the_last_scores(model: torch.nn.Module) -> None:
    plain, averaging = _learner(model, averaged=False), _learner(model)
    for one in (plain, averaging):
        with torch.no_grad():
            one.scores.neg_()
    assert torch.equal(plain.mask(), top_k_mask(plain.scores.detach(), 40))
    assert torch.equal(averaging.mask(), top_k_mask(-averaging.scores.detach(), 40))


def test_an_annealed_sparsity_starts_dense_and_ends_early(model: torch.nn.Module) -> None:
    learner = _learner(model, annealed=True)
    sizes = []
    for step in range(20):
        learner.step_number = step
        assert learner.training_mask().sum(dim=1).tolist() == [float(learner.kept_now())] * 3
        sizes.append(learner.kept_now())
    assert sizes[0] == 96
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[10:] == [40] * 10
    assert sizes[9] > 40 - 1
