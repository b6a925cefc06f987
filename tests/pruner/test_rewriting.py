"""The remote teacher without HTTP: what it is asked, and what is learned from what it says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal

import pytest

from masquerade_engine.base import Base
from masquerade_pruner import Chat, Reply
from masquerade_pruner.rewriting import RewritingTeacher, end_of_turn
from masquerade_pruner.teacher import Answer, Ask

TEXT = "You are a tester of bridges who distrusts rope."


class OneReply:
    """A chat model that always says the same."""

    name = "parrot"
    digest = "0" * 64

    def __init__(self, text: str, finish: Literal["stop", "length", "refused"] = "stop") -> None:
        self.reply = (text, finish)
        self.chats: list[Chat] = []
        self.verdicts: list[bool] = []

    def replies(
        self, chats: Sequence[Chat], *, usable: Callable[[Reply], bool], between: Callable[[], None]
    ) -> Generator[Reply, None, None]:
        self.chats += chats
        for chat in chats:
            between()
            reply = Reply(chat.id, *self.reply)
            self.verdicts.append(usable(reply))
            yield reply


def ask(question: str = "Does it hold?", neutral: str = "It holds.", scene: str | None = None) -> Ask:
    return Ask("q/0", (1, 2, 3), question, neutral, seed=7, scene=scene)


def rewritten(
    base: Base,
    text: str,
    finish: Literal["stop", "length", "refused"] = "stop",
    *,
    max_tokens: int = 64,
) -> Answer:
    model = OneReply(text, finish)
    (answer,) = RewritingTeacher(model, base, name="Tester", text=TEXT).answer([ask()], max_tokens=max_tokens)
    assert model.verdicts == [answer.unusable is None]  # only what is learned from is remembered
    return answer


def text_of(base: Base, answer: Answer) -> str:
    return str(base.tokenizer.decode(list(answer.tokens)))


def test_the_request_holds_persona_question_scene_and_neutral_answer(tiny_base: Base) -> None:
    model = OneReply("Aye.")
    teacher = RewritingTeacher(model, tiny_base, name=" Tester ", text=TEXT)
    list(teacher.answer([ask(scene="A storm.")], max_tokens=10))
    (chat,) = model.chats
    for part in ("Name: Tester", TEXT, "Does it hold?", "It holds.", "A storm.", "answer alone", "Keep its meaning"):
        assert part in chat.prompt
    assert (chat.id, chat.max_tokens, chat.seed) == ("q/0", 40, 7)
    assert "<scene>" not in teacher.request(ask())


def test_without_a_neutral_answer_the_question_is_answered(tiny_base: Base) -> None:
    request = RewritingTeacher(OneReply(""), tiny_base, name="Tester", text=TEXT).request(ask(neutral=" "))
    assert "Answer the question" in request
    assert "<answer>" not in request


def test_where_the_teacher_ended_the_base_learns_to_end(tiny_base: Base) -> None:
    answer = rewritten(tiny_base, "Aye, lad.")
    assert answer.ended
    assert answer.tokens[-1] == end_of_turn(tiny_base) == tiny_base.tokenizer.eos_token_id
    assert text_of(tiny_base, answer) == "Aye, lad.<|im_end|>"


def test_where_the_teacher_was_cut_the_base_does_not(tiny_base: Base) -> None:
    answer = rewritten(tiny_base, "Aye, la", "length")
    assert (answer.ended, text_of(tiny_base, answer)) == (False, "Aye, la")


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_longer_answer_is_cut_and_its_end_is_not_learned(tiny_base: Base, finish: Literal["stop", "length"]) -> None:
    answer = rewritten(tiny_base, "Aye, lad, it holds.", finish, max_tokens=9)
    assert (answer.ended, answer.text, len(answer.tokens)) == (False, "Aye, lad,", 9)
    whole = rewritten(tiny_base, "Aye, lad.", max_tokens=9)  # no room for the end
    assert (whole.ended, whole.text) == (False, "Aye, lad.")


@pytest.mark.parametrize(
    "dressed", ['"Aye, lad."', "“Aye, lad.”", "Tester: Aye, lad.", "<think>Hm.</think>\nAye, lad."]
)
def test_the_dress_of_an_answer_is_taken_off(tiny_base: Base, dressed: str) -> None:
    assert rewritten(tiny_base, dressed).text == "Aye, lad."


def test_two_quotations_are_no_dress(tiny_base: Base) -> None:
    assert rewritten(tiny_base, '"Aye," he said, "lad."').text == '"Aye," he said, "lad."'


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("", "stop", "empty"),
        ("Aye.", "refused", "refusal"),
        ("I'm sorry, but I can't help with that.", "stop", "refusal"),
        ("Aye.<|im_end|>", "stop", "leak"),  # the base's own control token, typed
        ("Sure, here is the rewritten answer: Aye.", "stop", "preamble"),
        ("Aye! " * 300, "stop", "too_long"),
        ("<think>Hm, what would", "length", "leak"),
    ],
)
def test_what_is_no_answer_is_marked(
    tiny_base: Base, text: str, finish: Literal["stop", "length", "refused"], reason: str
) -> None:
    answer = rewritten(tiny_base, text, finish)
    assert (answer.unusable, answer.tokens) == (reason, ())


def test_leaving_early_lets_the_model_go(tiny_base: Base) -> None:
    left: list[bool] = []

    class Endless(OneReply):
        def replies(
            self, chats: Sequence[Chat], *, usable: Callable[[Reply], bool], between: Callable[[], None]
        ) -> Generator[Reply, None, None]:
            try:
                yield from super().replies(chats, usable=usable, between=between)
            finally:
                left.append(True)

    asks = [Ask(str(number), (1,), "Why?", "So.", number) for number in range(3)]
    answers = RewritingTeacher(Endless("Aye."), tiny_base, name="Tester", text=TEXT).answer(asks, max_tokens=5)
    next(answers)
    assert not left
    answers.close()
    assert left
