"""Evaluate: how faithful a mask is to the dense persona model on questions that nothing was chosen by.

KL to the dense model on its own answers, gap closed against the strongest baseline of the same size (chosen on
validation), top-1 agreement, and free-running figures, because KL alone is circular.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from masquerade_pruner.bootstrap import Values, gap_closed, mean_interval
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import Divergence, HeldOut
from masquerade_pruner.tree import Forward

REPORT_FORMAT = "masquerade.report/1"
SENSITIVE_SHARE = 0.4  # of the test questions, by sensitivity, are reported as sensitive: the selection's own share


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """Sampled answers to the same questions, by the dense persona model and by its sub-network."""

    dense: Sequence[Example]
    sculpted: Sequence[Example]
    dense_nll: torch.Tensor  # [examples]: the dense model's NLL of its own samples, nats a token
    sculpted_nll: torch.Tensor  # [examples]: the dense model's NLL of the sub-network's samples


def fidelity(
    held_out: HeldOut,
    examples: Sequence[Example],
    changed: Forward,
    baselines: Mapping[str, Forward],
    strongest: str,
) -> dict[str, Any]:
    """The comparison on one kind of context: all questions, the sensitive and the insensitive ones."""
    ours = held_out.divergence(changed)
    rivals = {name: held_out.divergence(rival) for name, rival in baselines.items()}
    threshold = np.quantile([one.sensitivity or 0.0 for one in examples], 1 - SENSITIVE_SHARE)
    sensitive = np.array([(one.sensitivity or 0.0) >= threshold for one in examples])
    groups = {"all": np.ones(len(examples), dtype=bool), "sensitive": sensitive, "insensitive": ~sensitive}
    return {name: _compare(ours, rivals, strongest, chosen) for name, chosen in groups.items() if chosen.any()} | {
        "per_question": {
            "kl": _rounded(ours.kl),
            "baselines": {name: _rounded(one.kl) for name, one in rivals.items()},
        }
    }


def _compare(
    ours: Divergence,
    rivals: Mapping[str, Divergence],
    strongest: str,
    chosen: np.ndarray[Any, np.dtype[np.bool_]],
) -> dict[str, Any]:
    kl = _values(ours.kl)[chosen]
    return {
        "num_questions": int(chosen.sum()),
        "kl": mean_interval(kl).as_dict(),
        "top1_agreement": mean_interval(_values(ours.top1)[chosen]).as_dict(),
        "baseline_kl": {name: mean_interval(_values(rival.kl)[chosen]).as_dict() for name, rival in rivals.items()},
        "gap_closed": gap_closed([kl], [_values(rivals[strongest].kl)[chosen]]).as_dict(),
    }


def free_running(samples: FreeRunning) -> dict[str, Any]:
    """What the sub-network says when it runs by itself, beside what the dense model says."""
    return {
        "num_questions": len(samples.sculpted),
        "dense_nll_of_dense": mean_interval(_values(samples.dense_nll)).as_dict(),
        "dense_nll_of_sculpted": mean_interval(_values(samples.sculpted_nll)).as_dict(),
        "stop_rate": {"dense": stop_rate(samples.dense), "sculpted": stop_rate(samples.sculpted)},
        "repetition": {"dense": repetition(samples.dense), "sculpted": repetition(samples.sculpted)},
        "samples": [
            {"question": one.question, "dense": one.answer_text, "sculpted": other.answer_text}
            for one, other in zip(samples.dense[:5], samples.sculpted[:5], strict=True)
        ],
    }


def strongest_baseline(validation_kl: Mapping[str, float]) -> str:
    """The baseline with the lowest KL on validation."""
    return min(validation_kl, key=lambda name: validation_kl[name])


def stop_rate(examples: Sequence[Example]) -> float:
    """Share of the answers that ended by themselves."""
    return round(float(np.mean([one.ended for one in examples])), 4)


def repetition(examples: Sequence[Example]) -> float:
    """Share of an answer's token 4-grams that repeat an earlier one of it, mean over answers."""
    shares = []
    for one in examples:
        grams = Counter(zip(*(one.answer[offset:] for offset in range(4)), strict=False))
        total = sum(grams.values())
        shares.append((total - len(grams)) / total if total else 0.0)
    return round(float(np.mean(shares)), 4)


def _values(tensor: torch.Tensor) -> Values:
    return tensor.double().numpy()


def _rounded(tensor: torch.Tensor) -> list[float]:
    return [round(float(value), 5) for value in tensor]
