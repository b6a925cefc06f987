"""What is asked: which persona each request goes to, when it departs, and its words."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# Each word is one token of the usual byte-level BPE vocabularies, with a space before it and (the first of a question)
# without: a question of n words has n tokens.
_WORDS = (
    "time people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area "
    "money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face level office door health person art war history party result change reason research "
    "girl moment air teacher force education"
)
WORDS = tuple(_WORDS.split())


class Popularity(StrEnum):
    """How requests spread over the personas."""

    DISTINCT = "distinct"  # each takes the next persona: as many different ones at once as there are
    UNIFORM = "uniform"
    ZIPF = "zipf"  # the persona of rank r with weight r to the power of minus s
    IDENTICAL = "identical"  # one persona for all


@dataclass(frozen=True, slots=True)
class Call:
    """One request of the load."""

    model: str
    question: str
    departs_s: float = 0.0  # from the start of the load


def choose(
    models: Sequence[str], popularity: Popularity, count: int, *, zipf_s: float = 1.0, seed: int = 0
) -> list[str]:
    """The model of each of `count` requests. Which model has which rank is drawn too."""
    rng = random.Random(f"popularity {seed}")
    ranked = rng.sample(models, len(models))
    match popularity:
        case Popularity.DISTINCT:
            return list(itertools.islice(itertools.cycle(ranked), count))
        case Popularity.IDENTICAL:
            return ranked[:1] * count
        case Popularity.UNIFORM:
            return rng.choices(ranked, k=count)
        case Popularity.ZIPF:
            weights = [(rank + 1) ** -zipf_s for rank in range(len(ranked))]
            return rng.choices(ranked, weights, k=count)


def departures(count: int, request_rate: float | None, *, seed: int = 0) -> list[float]:
    """Seconds from the start: a Poisson process of `request_rate` a second, or all at once (None)."""
    if request_rate is None:
        return [0.0] * count
    rng = random.Random(f"departures {seed}")
    return list(itertools.accumulate(rng.expovariate(request_rate) for _ in range(count)))


def question(num_tokens: int, seed: object) -> str:
    """Words without much sense, other ones for every seed: only the persona's own prompt can come from a cache."""
    return " ".join(random.Random(f"question {seed}").choices(WORDS, k=num_tokens))
