"""Oracles: a random sub-network of a tiny base, and what an answer scores alone."""

from __future__ import annotations

import numpy as np
import torch

from masquerade_engine.base import Base
from masquerade_engine.reference import reference_logits
from masquerade_masks import Mask, SubNetwork
from masquerade_pruner.likelihood import Candidate


def random_subnetwork(base: Base, *, recovered: bool) -> SubNetwork:
    """Half of the neurons, with gains and biases where `recovered`."""
    rng = np.random.default_rng(3)
    shape = base.shape
    kept = shape.intermediate_size // 2
    indices = np.stack([rng.permutation(shape.intermediate_size)[:kept] for _ in range(shape.num_layers)])
    mask = Mask.from_kept_indices(np.sort(indices, axis=1), shape.intermediate_size)
    if not recovered:
        return SubNetwork(base.fingerprint, shape, mask)
    gain = rng.uniform(0.5, 1.5, (shape.num_layers, kept)).astype(np.float16)
    bias = rng.normal(0, 0.2, (shape.num_layers, shape.hidden_size)).astype(np.float16)
    return SubNetwork(base.fingerprint, shape, mask, gain=gain, bias=bias)


def brute_force(model: torch.nn.Module, one: Candidate, subnetwork: SubNetwork | None) -> tuple[float, bool]:
    """Log-likelihood and greediness of an answer, from a whole sequence alone."""
    coefficients = biases = None
    if subnetwork is not None:
        coefficients = torch.from_numpy(subnetwork.coefficients())
        found = subnetwork.biases()
        biases = None if found is None else torch.from_numpy(found)
    logits = reference_logits(model, torch.tensor([[*one.prompt, *one.answer]]), coefficients, biases)[0]
    rows = logits[len(one.prompt) - 1 : -1].double().log_softmax(-1)
    answer = torch.tensor(one.answer)
    return float(rows.gather(1, answer[:, None]).sum()), bool((rows.argmax(-1) == answer).all())
