"""The soak's judgement of transcripts: what it refuses, and that none excuses itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from soak import Exchange, Replay, Step, judge
from town import Character

EXCHANGE = Exchange(Character("A", "B"), (), None, "0" * 16, "", (), 10)
CLOSE = Step(served=5, logprob_served=-0.5, logprob_solo=-0.501, likeliest=5, gap=1.0, difference=0.001)


def replay(*steps: Step, seed: int | None = None) -> Replay:
    return Replay(replace(EXCHANGE, seed=seed), steps, same_text=True)


def test_rounding_is_accepted() -> None:
    tied = replace(CLOSE, served=6, gap=0.0015)  # within twice 0.001: either token is fine
    assert judge([replay(CLOSE), replay(CLOSE, tied)], 0.01) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"served": 6},  # solo another token is likelier by 1.0
        {"served": 6, "gap": 0.0021},
        {"logprob_solo": -0.6},  # the token was drawn from another distribution
    ],
)
def test_a_contradiction_is_refused(wrong: dict[str, Any]) -> None:
    (found,) = judge([replay(CLOSE), replay(CLOSE, replace(CLOSE, **wrong))], 0.01)
    assert found.startswith("transcript 1 (greedy): token 1 ")


def test_a_wrong_transcript_does_not_widen_its_own_bound() -> None:
    """Its own differences are large: measured on all transcripts, the rule would accept anything of it."""
    wrong = replace(CLOSE, served=6, gap=1.0, difference=0.9)
    found = judge([replay(CLOSE), replay(wrong)], 2.0)
    assert [one for one in found if one.startswith("transcript 1")]


def test_a_seeded_draw_need_not_be_the_likeliest() -> None:
    drawn = replace(CLOSE, served=6, gap=1.0)
    assert judge([replay(CLOSE), replay(drawn, seed=3)], 0.01) == []


def test_differences_beyond_rounding_are_refused_even_in_all_transcripts() -> None:
    other = replace(CLOSE, difference=0.5)
    assert len(judge([replay(other), replay(other)], 0.01)) == 2
