"""Which turns go where a conversation does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from running_server import RunningServer, stream_chunks

from masquerade_engine.prompt import ChatMessage
from masquerade_server.truncation import fitted, prompt_limit


def conversation(*turns: str) -> list[ChatMessage]:
    """`u`, `a` and `s` with a number: a turn of so many tokens."""
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    return [ChatMessage(roles[turn[0]], turn) for turn in turns]


def render(messages: Sequence[ChatMessage]) -> list[int]:
    """Each turn's size, as many times: a prompt whose tokens tell its turns."""
    sizes = [int(message.content[1:]) for message in messages]
    return [size for size in sizes for _ in range(size)]


@pytest.mark.parametrize(
    ("turns", "limit", "kept"),
    [
        (["u5", "a6", "u7"], 18, ["u5", "a6", "u7"]),
        (["u5", "a6", "u7"], 17, ["u7"]),
        (["u5", "a6", "u7"], 7, ["u7"]),
        (["u5", "a6", "u7"], 3, ["u7"]),  # too long by itself: stays, and is refused later
        (["u5", "a6", "u7", "a8", "u9"], 30, ["u7", "a8", "u9"]),
        (["u5", "a6", "u7", "a8", "u9"], 24, ["u7", "a8", "u9"]),
        (["u5", "a6", "u7", "a8", "u9"], 23, ["u9"]),
        (["s4", "u5", "a6", "d3", "u7", "a8", "u9"], 31, ["s4", "d3", "u7", "a8", "u9"]),
        (["s4", "u5", "a6", "d3", "u7", "a8", "u9"], 30, ["s4", "d3", "u9"]),
        (["a6", "u7", "a8", "u9"], 25, ["u7", "a8", "u9"]),  # a greeting goes first
        (["u5", "u6", "a7", "u8"], 21, ["u6", "a7", "u8"]),
        (["u5", "a6", "u7", "a8"], 15, ["u7", "a8"]),
        (["u9"], 3, ["u9"]),
        (["a9"], 3, ["a9"]),
        (["s9", "s8"], 3, ["s9", "s8"]),
    ],
)
def test_the_oldest_go_first_and_as_few_as_must(turns: list[str], limit: int, kept: list[str]) -> None:
    prompt, num_dropped = fitted(conversation(*turns), limit, render)
    assert prompt == render(conversation(*kept))
    assert num_dropped == len(turns) - len(kept)


def test_a_long_conversation_is_not_rendered_turn_by_turn() -> None:
    turns = conversation(*["u1", "a1"] * 1000, "u1")
    rendered: list[int] = []

    def counted(messages: Sequence[ChatMessage]) -> list[int]:
        rendered.append(len(messages))
        return render(messages)

    prompt, num_dropped = fitted(turns, 101, counted)
    assert (len(prompt), num_dropped) == (101, 1900)
    assert len(rendered) < 16


def test_room_is_left_for_the_answer() -> None:
    assert prompt_limit(8192, 1000) == 7192
    assert prompt_limit(8192, None) == 8192 - 256
    assert prompt_limit(200, None) == 100


# --- over HTTP: a token is a byte, and the context holds 512


def chat(town: RunningServer, num_turns: int, *, size: int = 60, **fields: Any) -> httpx.Response:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": f"{i}".rjust(size, ".")} for i in range(num_turns)]
    body = {"model": "mira", "messages": turns, "ignore_eos": True, "temperature": 0, **fields}
    return town.client.post("/v1/chat/completions", json=body)


def test_a_long_conversation_is_refused_unless_it_may_be_shortened(town: RunningServer) -> None:
    for truncation in (None, "disabled"):
        response = chat(town, 9, truncation=truncation)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    response = chat(town, 9, truncation="auto", max_tokens=4)
    assert response.status_code == 200
    dropped = int(response.headers["x-masquerade-dropped-turns"])
    assert dropped in (4, 6)
    assert response.json()["usage"]["prompt_tokens"] <= 512 - 4
    again = chat(town, 9 - dropped, size=60, truncation="auto", max_tokens=4)
    assert "x-masquerade-dropped-turns" not in again.headers


def test_what_is_left_is_answered_as_if_it_were_all(town: RunningServer) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x" * 90 + str(i)} for i in range(7)]
    body = {"model": "mira", "max_tokens": 8, "ignore_eos": True, "temperature": 0, "truncation": "auto"}
    whole = town.client.post("/v1/chat/completions", json=body | {"messages": turns})
    dropped = int(whole.headers["x-masquerade-dropped-turns"])
    assert dropped % 2 == 0
    assert dropped > 0
    rest = town.client.post("/v1/chat/completions", json=body | {"messages": turns[dropped:]})
    assert whole.json()["choices"] == rest.json()["choices"]
    streamed = town.client.post("/v1/chat/completions", json=body | {"messages": turns, "stream": True})
    assert streamed.headers["x-masquerade-dropped-turns"] == str(dropped)
    pieces = [one["choices"][0]["delta"].get("content", "") for one in stream_chunks(streamed)]
    assert "".join(pieces) == rest.json()["choices"][0]["message"]["content"]


def test_without_a_limit_there_is_room_for_an_answer(town: RunningServer) -> None:
    response = chat(town, 5, truncation="auto", size=70)
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] <= 256
    assert usage["total_tokens"] == 512


def test_the_last_users_turn_is_never_dropped(town: RunningServer) -> None:
    for stream in (False, True):
        response = chat(town, 3, size=600, truncation="auto", stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    response = chat(town, 3, size=60, truncation="auto", max_tokens=450)
    assert response.json()["error"]["param"] == "max_tokens"
