"""Which type learning runs in, and what of it is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from masquerade_engine.base import Base
from masquerade_kernels import cpu_dots
from masquerade_pruner.examples import Example
from masquerade_pruner.learner import build_learner, learning_dtype
from masquerade_pruner.recovery import RecoverySettings, recover


@pytest.mark.parametrize(
    ("dtype", "device", "is_faster", "wanted"),
    [
        (torch.bfloat16, "cpu", True, torch.float32),
        (torch.bfloat16, "cpu", False, torch.bfloat16),
        (torch.bfloat16, "cuda", True, torch.bfloat16),
        (torch.float32, "cpu", False, torch.float32),
        (torch.float64, "cpu", True, torch.float64),
    ],
)
def test_learning_runs_in_float32_where_that_is_faster_than_bf16(
    tiny_base: Base,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    device: str,
    is_faster: bool,
    wanted: torch.dtype,
) -> None:
    monkeypatch.setattr(cpu_dots, "multiplies_float32_faster", lambda: is_faster)
    assert learning_dtype(replace(tiny_base, dtype=dtype, device=torch.device(device))) is wanted


def test_a_wider_learner_has_the_bases_own_weights_and_stores_its_type(
    tiny_base: Base, make_examples: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(tiny_base, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu_dots, "multiplies_float32_faster", lambda: True)
    narrow, wide = base.build_model(), build_learner(base)
    for (name, one), (_, other) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert (one.dtype, other.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(one.float(), other), name
    mask = (torch.arange(96) % 3 > 0).float().expand(3, 96)
    settings = RecoverySettings(steps=2, validate_every=1, full_learning_rate=1e-2, num_reconstructed=4)
    losses = iter(range(100, 0, -1))  # whatever is last is best
    found = recover(
        wide, mask, "full", make_examples(8), lambda _: float(next(losses)), settings, own_dtype=torch.bfloat16
    )
    assert found.kind == "full"
    assert {one.dtype for one in found.full.values()} == {torch.bfloat16}
