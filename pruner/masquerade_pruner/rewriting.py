"""The remote teacher: a chat model rewrites each neutral answer in the persona's voice (the paper's second stage).

The model is reached through `ChatModel`. Whoever implements it speaks HTTP and keeps the address and the key; here are
the request, what is made of a reply, and the tokens that are learned from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

from masquerade_engine.base import Base
from masquerade_engine.control_tokens import control_tokens
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_pruner.answer_faults import fault_of
from masquerade_pruner.teacher import Answer, Ask

TEMPERATURE = 0.7  # samples of one question differ, and keep its meaning
_ROOM = 4  # the reply's token limit over the answer's: its tokens are others, and one that ends by itself is worth more

_TASK = (
    "Rewrite the answer below so that it sounds exactly like the character: their voice, their words, their manner, in "
    "the first person. Keep its meaning and its facts, and keep it about as long as it is. Reply with the rewritten "
    "answer alone: no introduction, no quotation marks, no notes, nothing about this task."
)
_TASK_WITHOUT_ANSWER = (
    "Answer the question below exactly as the character would: their voice, their words, their manner, in the first "
    "person, in two or three sentences. Reply with the answer alone: no introduction, no quotation marks, no notes, "
    "nothing about this task."
)


@dataclass(frozen=True, slots=True)
class Chat:
    """One request for one reply."""

    id: str
    prompt: str  # the user's message, and the only one: some templates know no system turn
    max_tokens: int  # of the chat model's own
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said."""

    chat_id: str
    text: str
    finish: Literal["stop", "length", "refused"]  # refused: by a content filter


class ChatModel(Protocol):
    """A chat model somewhere."""

    @property
    def name(self) -> str:
        """The model's own name, for metadata and reports: neither address nor key."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of the address and the name: replies of another model are others."""
        ...

    def replies(
        self, chats: Sequence[Chat], *, usable: Callable[[Reply], bool], between: Callable[[], None]
    ) -> Generator[Reply, None, None]:
        """Yield a reply a chat, in any order; leaving early gives up on the rest.

        A reply that is `usable` is remembered, and its chat never asked again. `between` is called at least twice a
        second and may raise. Raises `TeacherError` where the model does not answer.
        """
        ...


class RewritingTeacher:
    """A `Teacher` that has a chat model rewrite neutral answers for one persona of a base."""

    name = "remote"

    def __init__(
        self, model: ChatModel, base: Base, *, name: str, text: str, between: Callable[[], None] = lambda: None
    ) -> None:
        self._model = model
        self._tokenizer = base.tokenizer
        self._end = end_of_turn(base)
        self._name = name.strip()
        self._text = text.strip()
        self._between = between

    def answer(self, asks: Sequence[Ask], *, max_tokens: int) -> Generator[Answer, None, None]:
        """Yield one answer an ask; those that are no answer in the persona's voice are marked unusable.

        An answer that is longer than `max_tokens` of the base's tokens is cut.
        """
        by_id = {ask.id: ask for ask in asks}
        chats = [
            Chat(ask.id, self.request(ask), _ROOM * max_tokens, temperature=TEMPERATURE, seed=ask.seed) for ask in asks
        ]
        with closing(
            self._model.replies(
                chats, usable=lambda reply: self._fault(by_id[reply.chat_id], reply) is None, between=self._between
            )
        ) as replies:
            for reply in replies:
                yield self._answer(by_id[reply.chat_id], reply, max_tokens)

    def request(self, ask: Ask) -> str:
        """What the chat model is asked."""
        parts = [
            _task(ask),
            f"<character>\nName: {self._name}\n{self._text}\n</character>",
            *([f"<scene>\n{ask.scene}\n</scene>"] if ask.scene else []),
            f"<question>\n{ask.question}\n</question>",
            *([f"<answer>\n{ask.neutral_answer.strip()}\n</answer>"] if ask.neutral_answer.strip() else []),
        ]
        return "\n\n".join(parts)

    def _answer(self, ask: Ask, reply: Reply, max_tokens: int) -> Answer:
        text = self._spoken(reply)
        if (fault := self._fault(ask, reply)) is not None:
            return Answer(ask.id, (), text, ended=False, unusable=fault)
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if reply.finish == "stop" and len(tokens) < max_tokens:
            return Answer(ask.id, (*tokens, self._end), text, ended=True)
        if len(tokens) > max_tokens:
            tokens = tokens[:max_tokens]
            text = str(self._tokenizer.decode(tokens))
        return Answer(ask.id, tuple(tokens), text, ended=False)

    def _fault(self, ask: Ask, reply: Reply) -> str | None:
        if reply.finish == "refused":
            return "refusal"
        text = self._spoken(reply)
        if control_tokens(self._tokenizer).in_text(text):
            return "leak"
        return fault_of(text, instructions=_task(ask), persona_text=self._text, neutral_answer=ask.neutral_answer)

    def _spoken(self, reply: Reply) -> str:
        """The reply without its thoughts, and without the quotation marks or the name in front that are its dress."""
        text = re.sub(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", "", reply.text, flags=re.DOTALL).strip()
        text = re.sub(rf"\A\**{re.escape(self._name)}\**:\**\s+", "", text)
        for opening, closing_ in ('""', "“”"):
            inside = text[1:-1]
            if text[:1] == opening and text[-1:] == closing_ and not {opening, closing_} & set(inside):
                text = inside.strip()
        return text


def _task(ask: Ask) -> str:
    return _TASK if ask.neutral_answer.strip() else _TASK_WITHOUT_ANSWER


def end_of_turn(base: Base) -> int:
    """The token with which an assistant's turn ends in the base's chat template."""
    turn = [ChatMessage("user", "Hello."), ChatMessage("assistant", "Hello.")]
    rendered = render_chat(base.tokenizer, "Be brief.", turn, add_generation_prompt=False)
    stops = [token for token in rendered if token in base.stop_token_ids]
    # A template may leave the last turn open; the base then ends its answers with the text's own end.
    return stops[-1] if stops else min(base.stop_token_ids)
