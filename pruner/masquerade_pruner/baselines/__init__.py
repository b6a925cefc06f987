"""Other methods at the same size and from the same examples: what a learned mask is measured against.

Each takes a `Setting` and yields a `Baseline`: a forward that evaluation compares, and, where the method is a mask, the
mask that recovery can start from. A mask here keeps the same number of neurons in every layer, since that is what is
stored and served; FLAP and LLM-Pruner would otherwise spread it over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from masquerade_pruner.baselines.base import Baseline, Setting
from masquerade_pruner.baselines.depth import drop_ffns, drop_layers
from masquerade_pruner.baselines.fisher import fisher
from masquerade_pruner.baselines.flap import flap, flap_with_bias
from masquerade_pruner.baselines.griffin import griffin
from masquerade_pruner.baselines.llm_pruner import llm_pruner
from masquerade_pruner.baselines.random_mask import random_mask
from masquerade_pruner.baselines.slicegpt import slicegpt
from masquerade_pruner.baselines.wanda import wanda

METHODS: Mapping[str, Callable[[Setting], Baseline]] = {
    "random": random_mask,
    "wanda": wanda,
    "fisher": fisher,
    "flap": flap,
    "flap-bias": flap_with_bias,
    "llm-pruner": llm_pruner,
    "griffin": griffin,
    "depth-layers": drop_layers,
    "depth-ffns": drop_ffns,
    "slicegpt": slicegpt,
}

# Those whose result is a mask, so that recovery can start from it.
MASKS = frozenset({"random", "wanda", "fisher", "flap", "flap-bias", "llm-pruner", "griffin"})

__all__ = ["MASKS", "METHODS", "Baseline", "Setting"]
