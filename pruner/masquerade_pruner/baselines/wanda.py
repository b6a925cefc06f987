"""Wanda's metric over structures (arXiv 2306.11695; its structured form as in FLAP's comparison, arXiv 2312.11983)."""

from __future__ import annotations

from masquerade_pruner.baselines.base import Baseline, Setting, keep_best
from masquerade_pruner.importance import activation_importance


def wanda(setting: Setting) -> Baseline:
    """The neurons with the largest root mean square activation times the norm of their down-projection column."""
    return keep_best(setting, activation_importance(setting.model, setting.examples))
