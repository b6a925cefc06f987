"""Conversations longer than the context: which turns are dropped where a client asks for that."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from masquerade_engine.prompt import SCENE_ROLES, ChatMessage

Render = Callable[[Sequence[ChatMessage]], list[int]]  # messages to the tokens of their prompt

_ROOM_TOKENS = 256  # for the answer, where no limit is asked for; of a short context, at most half


def prompt_limit(context: int, wanted: int | None) -> int:
    """Tokens that a prompt may have in a `context`, so that the tokens to generate fit beside it."""
    return context - (min(_ROOM_TOKENS, context // 2) if wanted is None else wanted)


def fitted(messages: Sequence[ChatMessage], limit: int, render: Render) -> tuple[list[int], int]:
    """The prompt without the oldest turns, as few as must go for `limit` tokens, and how many went.

    A user's turn goes with the answers to it, so what is left begins with a user's turn again. System and developer
    messages stay, and so does all from the last user's turn on: where that alone is too long, so is the prompt.
    """
    prompt, cuts = render(messages), _cuts(messages)
    if len(prompt) <= limit or not cuts:
        return prompt, 0
    enough = bisect_left(cuts, True, key=lambda cut: len(render(_from(messages, cut))) <= limit)
    kept = _from(messages, cuts[min(enough, len(cuts) - 1)])
    return render(kept), len(messages) - len(kept)


def _cuts(messages: Sequence[ChatMessage]) -> list[int]:
    """Where the conversation may begin instead: every user's turn but one that opens it."""
    opening = next((index for index, message in enumerate(messages) if message.role not in SCENE_ROLES), 0)
    return [index for index, message in enumerate(messages) if message.role == "user" and index > opening]


def _from(messages: Sequence[ChatMessage], cut: int) -> list[ChatMessage]:
    return [message for index, message in enumerate(messages) if index >= cut or message.role in SCENE_ROLES]
