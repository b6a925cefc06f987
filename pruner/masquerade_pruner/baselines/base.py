"""What a baseline is given, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from masquerade_engine.seams import persona_ffns
from masquerade_pruner.examples import Example
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.tree import Forward, masked


@dataclass(frozen=True, slots=True)
class Setting:
    """The base, the calibration examples of one persona, and the size to come down to."""

    model: torch.nn.Module
    examples: Sequence[Example]
    kept: int  # neurons of every layer; methods that are no masks drop as many parameters as this does
    seed: int = 0  # of methods that draw

    @property
    def num_dropped(self) -> int:
        """Parameters of the base that a mask of this size does without."""
        ffns = persona_ffns(self.model)
        hidden, intermediate = ffns[0].get_parameter("down_proj.weight").shape
        return len(ffns) * (intermediate - self.kept) * 3 * hidden


@dataclass(frozen=True, slots=True)
class Baseline:
    """One method's change of the base."""

    forward: Forward
    num_dropped: int  # parameters of the base it does without, less those it adds
    mask: torch.Tensor | None = None  # [layers, intermediate] fp32 0/1, `kept` a layer, where the method is a mask


def keep_best(setting: Setting, scores: torch.Tensor) -> Baseline:
    """The mask of each layer's highest scores, `[layers, intermediate]`."""
    mask = top_k_mask(scores.float(), setting.kept)
    return Baseline(masked(setting.model, mask), setting.num_dropped, mask)
