from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import SettingError
from masquerade_pruner.conversations import Script, at_turn, converse, free_figures, load_scripts
from masquerade_pruner.teacher import Answer, Ask

PROMPT = "You are a test."
SCRIPTS = [Script("inn", "An inn.", ("One?", "Two?", "Three?")), Script("sea", "A ship.", ("Uno?", "Due?", "Tre?"))]


class Parrot:
    """Says the same at every turn, and keeps what it was asked; `mute` at one turn where told so."""

    name = "parrot"

    def __init__(self, mute: str = "") -> None:
        self.asks: list[Ask] = []
        self._mute = mute

    def answer(self, asks: Sequence[Ask], *, max_tokens: int) -> Iterator[Answer]:
        self.asks += asks
        for ask in reversed(asks):  # finished in another order than asked
            tokens = () if ask.id == self._mute else (ord("a"), ord("b"), ord("c"), ord("d"), ord("e"))[:max_tokens]
            yield Answer(ask.id, tokens, " abcde ", ended=ask.id.startswith("inn"))


def test_the_scripts_that_ship_have_ten_turns_in_several_scenes() -> None:
    scripts = load_scripts()
    assert len(scripts) >= 5
    assert len({one.id for one in scripts}) == len({one.scene for one in scripts}) == len(scripts)
    assert {len(one.turns) for one in scripts} == {10}


def test_each_answer_becomes_an_earlier_turn(tiny_base: Base) -> None:
    parrot = Parrot()
    turns: list[None] = []
    held = converse(
        tiny_base,
        parrot,
        PROMPT,
        SCRIPTS,
        num_turns=2,
        max_tokens=16,
        context_length=512,
        seed=0,
        on_turn=lambda: turns.append(None),
    )
    assert [[one.question for one in conversation] for conversation in held] == [["One?", "Two?"], ["Uno?", "Due?"]]
    wanted = [
        ChatMessage("system", "An inn."),
        ChatMessage("user", "One?"),
        ChatMessage("assistant", "abcde"),
        ChatMessage("user", "Two?"),
    ]
    assert held[0][1].prompt == tuple(render_chat(tiny_base.tokenizer, PROMPT, wanted))
    assert (held[0][1].num_earlier_turns, held[0][1].scene, held[0][1].ended) == (1, "An inn.", True)
    assert len(turns) == 2
    assert len({ask.seed for ask in parrot.asks}) == 4
    assert [one.id for one in at_turn(held, 1)] == ["inn/turn-2", "sea/turn-2"]


def test_a_conversation_ends_where_its_next_turn_would_not_fit(tiny_base: Base) -> None:
    first = len(
        render_chat(tiny_base.tokenizer, PROMPT, [ChatMessage("system", "A ship."), ChatMessage("user", "Uno?")])
    )
    held = converse(tiny_base, Parrot(), PROMPT, SCRIPTS, num_turns=3, max_tokens=16, context_length=first + 16, seed=0)
    assert [len(one) for one in held] == [1, 1]


def test_a_conversation_ends_with_an_answer_of_nothing_and_the_others_go_on(tiny_base: Base) -> None:
    held = converse(
        tiny_base, Parrot("sea/turn-2"), PROMPT, SCRIPTS, num_turns=9, max_tokens=16, context_length=512, seed=0
    )
    assert [len(one) for one in held] == [3, 1]
    assert [one.topic for one in at_turn(held, 2)] == ["inn"]


def test_figures_tell_repetition_of_what_was_said_before(tiny_base: Base) -> None:
    held = converse(tiny_base, Parrot(), PROMPT, SCRIPTS, num_turns=2, max_tokens=16, context_length=512, seed=0)
    assert free_figures(held, 0) == {"num_conversations": 2, "stop_rate": 0.5, "repetition": 0.0, "echo": 0.0}
    assert free_figures(held, 1)["echo"] == 1.0


@pytest.mark.parametrize("content", ["{}", "[]", "x", json.dumps([{"id": "a", "scene": "b", "turns": []}])])
def test_bad_scripts_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scripts.json"
    path.write_text(content)
    with pytest.raises(SettingError, match="script"):
        load_scripts(path)
