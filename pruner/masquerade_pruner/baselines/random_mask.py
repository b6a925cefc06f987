"""A random mask: what a size costs when nothing is known."""

from __future__ import annotations

import torch

from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.importance import down_weights


def random_mask(setting: Setting) -> Baseline:
    """Uniformly random neurons of every layer, drawn from the setting's seed."""
    down = down_weights(setting.model)
    generator = torch.Generator().manual_seed(setting.seed)
    return keep_best(setting, torch.rand(len(down), down[0].shape[1], generator=generator))
