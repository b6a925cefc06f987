"""Fisher importance of a neuron's coefficient (as in arXiv 2204.09656, on masks of FFN neurons)."""

from __future__ import annotations

from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.importance import fisher_importance


def fisher(setting: Setting) -> Baseline:
    """The neurons whose coefficient has the largest mean squared gradient of cross-entropy."""
    return keep_best(setting, fisher_importance(setting.model, setting.examples))
