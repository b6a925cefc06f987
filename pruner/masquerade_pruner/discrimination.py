"""Discrimination: does a model know its own persona's answer among those that others gave to the same question?

Ten candidates of equal length a question: the dense persona's own answer, and the dense base's answers as nine of the
reference personas. A model ranks them by log p(a | P, q) - log p(a | q), both its own, so that what it has lost in
general is in both terms: what is left is how much the persona prompt speaks for an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from masquerade_pruner.bootstrap import Values, mean_interval
from masquerade_pruner.likelihood import Candidate, score
from masquerade_pruner.tree import Forward, masked

NUM_CANDIDATES = 10
LEAST_TOKENS = 4  # of a candidate: shorter ones say too little


@dataclass(frozen=True, slots=True)
class Contest:
    """One question with its candidates, all of one length; the first is the persona's own."""

    question_id: str
    with_prompt: tuple[int, ...]  # tokens up to the answer, under the persona prompt
    without_prompt: tuple[int, ...]  # the same question put to the base
    candidates: tuple[tuple[int, ...], ...]


def contest(
    question_id: str,
    with_prompt: tuple[int, ...],
    without_prompt: tuple[int, ...],
    answers: Sequence[tuple[int, ...]],
    longest: int,
) -> Contest | None:
    """Cut all answers to the shortest one's length, `longest` at most; None where too little is left.

    An own answer that another persona's repeats token for token has no right rank, so such a question is left out.
    """
    length = min(longest, *map(len, answers))
    candidates = tuple(answer[:length] for answer in answers)
    if length < LEAST_TOKENS or candidates[0] in candidates[1:]:
        return None
    return Contest(question_id, with_prompt, without_prompt, candidates)


def discriminate(
    model: torch.nn.Module,
    contests: Sequence[Contest],
    forwards: Mapping[str, Forward],
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Rank the candidates by each of `forwards`, and by how likely the base finds them without the persona prompt.

    `forwards` holds `sculpted`, and may hold `swapped_mask` beside others.
    """
    alone = _scores(model, contests, masked(model), prompted=False, between=between)
    ranks = {"dense_without_prompt": [rank_of_first(scores) for scores in alone]}
    for name, forward in forwards.items():
        given, prior = (_scores(model, contests, forward, prompted=one, between=between) for one in (True, False))
        ranks[name] = [rank_of_first(scores - before) for scores, before in zip(given, prior, strict=True)]
    first = {name: (np.array(found) == 1).astype(np.float64) for name, found in ranks.items()}
    reciprocal = {name: 1 / np.array(found) for name, found in ranks.items()}
    chances = [1 / len(one.candidates) for one in contests]
    report: dict[str, Any] = {
        "num_questions": len(contests),
        "num_candidates": max(len(one.candidates) for one in contests),
        "chance": round(float(np.mean(chances)), 4),
    }
    for name in ranks:
        report[name] = {
            "top1": mean_interval(first[name]).as_dict(),
            "reciprocal_rank": mean_interval(reciprocal[name]).as_dict(),
        }
    if "swapped_mask" in ranks:
        difference = reciprocal["sculpted"] - reciprocal["swapped_mask"]
        report["own_minus_swapped"] = mean_interval(difference).as_dict()  # of the reciprocal rank, paired
    return report


def rank_of_first(scores: Values) -> float:
    """The rank of the first among all, 1 the best; a tie counts half a place."""
    others = scores[1:]
    return float(1 + (others > scores[0]).sum() + 0.5 * (others == scores[0]).sum())


def _scores(
    model: torch.nn.Module,
    contests: Sequence[Contest],
    forward: Forward,
    *,
    prompted: bool,
    between: Callable[[], None],
) -> list[Values]:
    """Log-likelihoods of every contest's candidates."""
    candidates = [
        Candidate(one.with_prompt if prompted else one.without_prompt, answer)
        for one in contests
        for answer in one.candidates
    ]
    found = score(model, candidates, forward, between=between).log_likelihood.numpy()
    return np.split(found, np.cumsum([len(one.candidates) for one in contests])[:-1])
