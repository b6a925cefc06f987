"""Evaluate: how faithful a mask is to the dense persona model on questions that nothing was chosen by.

KL to the dense model on its own answers, gap closed against the strongest baseline of the same size (chosen on
validation), top-1 agreement, and free-running figures, because KL alone is circular. Where a remote teacher wrote the
answers the dense model is not the target: the NLL of the teacher's held-out answers takes KL's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from masquerade_pruner.bootstrap import Values, gap_closed, mean_interval
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import Divergence, HeldOut
from masquerade_pruner.tree import Forward

REPORT_FORMAT = "masquerade.report/1"
Chosen = npt.NDArray[np.bool_]  # [questions]
SENSITIVE_SHARE = 0.4  # of the test questions, by sensitivity, are reported as sensitive: the selection's own share


@dataclass(frozen=True, slots=True)
class FreeRunning:
    """Answers to the same questions, by whoever the sub-network learned from and by the sub-network itself."""

    reference: Sequence[Example]
    sculpted: Sequence[Example]
    reference_nll: torch.Tensor  # [examples]: the dense model's NLL of the reference's answers, nats a token
    sculpted_nll: torch.Tensor  # [examples]: the dense model's NLL of the sub-network's samples
    writer: Literal["dense", "teacher"] = "dense"  # of the reference: the dense persona model, or a remote teacher


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
    return {name: _compare(ours, rivals, strongest, chosen) for name, chosen in _groups(examples).items()} | {
        "per_question": {
            "kl": _rounded(ours.kl),
            "baselines": {name: _rounded(one.kl) for name, one in rivals.items()},
        }
    }


def likelihood(
    held_out: HeldOut,
    examples: Sequence[Example],
    changed: Forward,
    baselines: Mapping[str, Forward],
    strongest: str,
) -> dict[str, Any]:
    """`fidelity` for a remote teacher's answers: mean NLL a token in place of KL, in nats.

    Gap closed is 1 - NLL(ours) / NLL(strongest). NLL does not reach 0 but the teacher's own entropy, so the figure is
    smaller than one in KL for the same work; the dense model's NLL is given beside it, and may be beaten.
    """
    ours, dense = held_out.nll(changed), held_out.dense_nll()
    rivals = {name: held_out.nll(rival) for name, rival in baselines.items()}
    return {
        name: {
            "num_questions": int(chosen.sum()),
            "nll": mean_interval(_values(ours)[chosen]).as_dict(),
            "dense_nll": mean_interval(_values(dense)[chosen]).as_dict(),
            "baseline_nll": {name: mean_interval(_values(rival)[chosen]).as_dict() for name, rival in rivals.items()},
            "gap_closed": gap_closed([_values(ours)[chosen]], [_values(rivals[strongest])[chosen]]).as_dict(),
        }
        for name, chosen in _groups(examples).items()
    } | {
        "per_question": {
            "nll": _rounded(ours),
            "dense_nll": _rounded(dense),
            "baselines": {name: _rounded(one) for name, one in rivals.items()},
        }
    }


def _groups(examples: Sequence[Example]) -> dict[str, Chosen]:
    """All questions, the sensitive ones and the others; groups without a question are left out."""
    threshold = np.quantile([one.sensitivity or 0.0 for one in examples], 1 - SENSITIVE_SHARE)
    sensitive = np.array([(one.sensitivity or 0.0) >= threshold for one in examples])
    groups = {"all": np.ones(len(examples), dtype=bool), "sensitive": sensitive, "insensitive": ~sensitive}
    return {name: chosen for name, chosen in groups.items() if chosen.any()}


def _compare(
    ours: Divergence,
    rivals: Mapping[str, Divergence],
    strongest: str,
    chosen: Chosen,
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
    """What the sub-network says when it runs by itself, beside what it learned from."""
    writer = samples.writer
    return {
        "num_questions": len(samples.sculpted),
        f"dense_nll_of_{writer}": mean_interval(_values(samples.reference_nll)).as_dict(),
        "dense_nll_of_sculpted": mean_interval(_values(samples.sculpted_nll)).as_dict(),
        "stop_rate": {writer: stop_rate(samples.reference), "sculpted": stop_rate(samples.sculpted)},
        "repetition": {writer: repetition(samples.reference), "sculpted": repetition(samples.sculpted)},
        "samples": [
            {"question": one.question, writer: one.answer_text, "sculpted": other.answer_text}
            for one, other in zip(samples.reference[:5], samples.sculpted[:5], strict=True)
        ],
    }


def strongest_baseline(on_validation: Mapping[str, float]) -> str:
    """The baseline with the lowest KL (or NLL) on validation."""
    return min(on_validation, key=lambda name: on_validation[name])


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
