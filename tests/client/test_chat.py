"""Chat replies, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from masquerade_client import (
    APIConnectionError,
    ChatCompletion,
    Choice,
    InvalidResponse,
    Message,
    Model,
    NotFound,
    ServerError,
    Usage,
)

HEAD = {"id": "c-1", "created": 1, "model": "mira", "system_fingerprint": "v1-abc"}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 5},
    "a_field_of_tomorrow": {},
}


def sse(*payloads: Any) -> bytes:
    return "".join(
        f"data: {one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)}\n\n" for one in payloads
    ).encode()


def chunk(delta: dict[str, Any], finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return HEAD | {"object": "chat.completion.chunk", "choices": [choice], "usage": None}


OPENING = chunk({"role": "assistant", "content": ""})
PIECES = [chunk({"content": "Grüß "}), chunk({"content": "Gott 🎭"})]
ENDING = chunk({}, "stop")
LAST = HEAD | {"choices": [], "usage": USAGE}


def test_a_whole_reply(client_of: Any) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Aye."}, "finish_reason": "stop"}
    client = client_of(lambda _: httpx.Response(200, json=HEAD | {"choices": [choice], "usage": USAGE}))
    reply = client.call(lambda c: c.chat.complete("mira@dense", "Hello?", max_tokens=9, stop=["\n"], temperature=None))
    choices = (Choice(0, "Aye.", "stop"),)
    assert reply == ChatCompletion("c-1", "mira", "Aye.", "stop", Usage(7, 2, 9, 5), 1, "v1-abc", choices=choices)
    (request,) = client.requests
    assert request.url == "http://test/v1/chat/completions"
    assert json.loads(request.content) == {
        "model": "mira@dense",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 9,
        "stop": ["\n"],
    }


def test_messages_as_records_or_mappings(client_of: Any) -> None:
    client = client_of(lambda _: httpx.Response(404, json={"error": {"message": "no persona 'x'"}}))
    turns = [{"role": "system", "content": "Rain."}, Message("user", "Hm?")]
    with pytest.raises(NotFound, match="no persona 'x'"):
        client.call(lambda c: c.chat.complete("x", turns))
    assert json.loads(client.requests[0].content)["messages"] == [
        {"role": "system", "content": "Rain."},
        {"role": "user", "content": "Hm?"},
    ]


def test_a_misspelt_option_is_refused_before_anything_is_sent(client_of: Any) -> None:
    client = client_of(lambda _: pytest.fail("sent"))
    with pytest.raises(TypeError, match="temprature"):
        client.call(lambda c: c.chat.complete("mira", "Hello?", temprature=0.1))


def test_a_streamed_reply(client_of: Any, pieces: Any) -> None:
    body = sse(OPENING, *PIECES, ENDING, LAST, "[DONE]")
    cut = body.index("ü".encode()) + 1
    stream = pieces(body[:cut], body[cut : cut + 1], body[cut + 1 :])
    client = client_of(lambda _: httpx.Response(200, stream=stream))
    chunks: list[Any] = []
    reply = client.iterate(lambda c: c.chat.stream("mira", "Hello?", seed=3), chunks)
    assert [one.text for one in chunks] == ["", "Grüß ", "Gott 🎭", "", ""]
    assert [one.finish_reason for one in chunks] == [None, None, None, "stop", None]
    assert [one.usage for one in chunks] == [None] * 4 + [Usage(7, 2, 9, 5)]
    assert (reply.text, reply.finish_reason, reply.usage) == ("Grüß Gott 🎭", "stop", Usage(7, 2, 9, 5))
    assert stream.closed
    sent = json.loads(client.requests[0].content)
    assert (sent["stream"], sent["stream_options"], sent["seed"]) == (True, {"include_usage": True}, 3)


def test_a_whole_reply_of_several_choices(client_of: Any) -> None:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": logprobs,
            "finish_reason": "stop",
        }
        for index, (text, logprobs) in enumerate((("Aye.", {"content": []}), ("No.", None)))
    ]
    headers = {"x-masquerade-dropped-turns": "4"}
    client = client_of(lambda _: httpx.Response(200, json=HEAD | {"choices": choices, "usage": USAGE}, headers=headers))
    reply = client.call(lambda c: c.chat.complete("mira", "Hm?", n=2, deadline_s=2.5, truncation="auto"))
    assert reply.choices == (Choice(0, "Aye.", "stop", {"content": []}), Choice(1, "No.", "stop"))
    assert (reply.text, reply.logprobs, reply.dropped_turns) == ("Aye.", {"content": []}, 4)
    sent = json.loads(client.requests[0].content)
    assert (sent["n"], sent["deadline_s"], sent["truncation"]) == (2, 2.5, "auto")


def test_a_streamed_reply_of_several_choices(client_of: Any, pieces: Any) -> None:
    body = sse(
        OPENING,
        chunk({"role": "assistant", "content": ""}, index=1),
        chunk({"content": "No"}, index=1),
        chunk({"content": "Aye."}),
        chunk({}, "stop"),
        chunk({"content": ", no"}, index=1),
        chunk({}, "length", index=1),
        LAST,
        "[DONE]",
    )
    headers = {"x-masquerade-dropped-turns": "2"}
    client = client_of(lambda _: httpx.Response(200, stream=pieces(body), headers=headers))
    chunks: list[Any] = []
    reply = client.iterate(lambda c: c.chat.stream("mira", "Hm?", n=2), chunks)
    assert [one.text for one in chunks if one.index == 1] == ["", "No", ", no", ""]
    assert reply.choices == (Choice(0, "Aye.", "stop"), Choice(1, "No, no", "length"))
    assert (reply.text, reply.finish_reason, reply.usage) == ("Aye.", "stop", Usage(7, 2, 9, 5))
    assert reply.dropped_turns == 2


def test_a_deadline_that_passed_is_not_tried_again(client_of: Any) -> None:
    late = {"error": {"message": "no token came", "type": "deadline_exceeded", "code": "deadline_exceeded"}}
    client = client_of(lambda _: httpx.Response(504, json=late, headers={"x-should-retry": "false"}))
    with pytest.raises(ServerError) as caught:
        client.call(lambda c: c.chat.complete("mira", "Hm?", deadline_s=0.1))
    assert caught.value.code == "deadline_exceeded"
    assert len(client.requests) == 1


def test_leaving_early_closes_the_connection(client_of: Any, pieces: Any) -> None:
    stream = pieces(sse(OPENING), sse(*PIECES), sse(ENDING, LAST, "[DONE]"))
    client = client_of(lambda _: httpx.Response(200, stream=stream))
    seen: list[Any] = []
    assert client.iterate(lambda c: c.chat.stream("mira", "Hello?"), seen, limit=2) is None
    assert seen[1].text == "Grüß "
    assert stream.closed


@pytest.mark.parametrize(
    "cut", [[sse(OPENING, PIECES[0])], [sse(OPENING), httpx.ReadError("reset")], [sse(OPENING), b"data: {"]]
)
def test_a_reply_cut_off_is_an_error_and_not_a_short_reply(client_of: Any, pieces: Any, cut: Any) -> None:
    client = client_of(lambda _: httpx.Response(200, stream=pieces(*cut)))
    with pytest.raises(APIConnectionError):
        client.iterate(lambda c: c.chat.stream("mira", "Hello?"), [])
    assert len(client.requests) == 1  # pieces were handed out: no silent second reply


def test_an_error_in_mid_stream(client_of: Any, pieces: Any) -> None:
    error = {"error": {"message": "the engine stopped", "type": "server_error", "code": "engine_stopped"}}
    client = client_of(lambda _: httpx.Response(200, stream=pieces(sse(OPENING, error))))
    with pytest.raises(ServerError, match="the engine stopped") as caught:
        client.iterate(lambda c: c.chat.stream("mira", "Hello?"), [])
    assert caught.value.code == "engine_stopped"


def test_a_refused_stream_is_read_and_retried(client_of: Any, pieces: Any) -> None:
    full = {"error": {"message": "the queue is full", "code": "queue_full"}}
    rest = [
        httpx.Response(429, json=full, headers={"retry-after": "2"}),
        httpx.Response(200, stream=pieces(sse(OPENING, ENDING, "[DONE]"))),
    ]
    client = client_of(lambda _: _fresh(rest.pop(0)))
    assert client.iterate(lambda c: c.chat.stream("mira", "Hello?"), []).finish_reason == "stop"
    assert client.pauses == [2.0]


def _fresh(response: httpx.Response) -> httpx.Response:
    if isinstance(response.stream, httpx.ByteStream):
        return httpx.Response(response.status_code, content=response.content, headers=response.headers)
    return response


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"role": "assistant", "content": 3}}]}',
        b'{"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": null}]}',  # no id
    ],
)
def test_answers_of_something_else(client_of: Any, body: bytes) -> None:
    client = client_of(lambda _: httpx.Response(200, content=body))
    with pytest.raises(InvalidResponse):
        client.call(lambda c: c.chat.complete("mira", "Hello?"))


@pytest.mark.parametrize("body", [sse("{"), sse([1]), sse("[DONE]"), sse({"choices": [1]})])
def test_streams_of_something_else(client_of: Any, pieces: Any, body: bytes) -> None:
    client = client_of(lambda _: httpx.Response(200, stream=pieces(body)))
    with pytest.raises(InvalidResponse):
        client.iterate(lambda c: c.chat.stream("mira", "Hello?"), [])


def test_models(client_of: Any) -> None:
    entry = {
        "id": "mira",
        "object": "model",
        "created": 5,
        "owned_by": "masquerade",
        "root": "b",
        "parent": None,
    }
    client = client_of(lambda r: httpx.Response(200, json=entry if "mira" in r.url.path else {"data": [entry]}))
    expected = Model("mira", 5, "masquerade", "b", None)
    assert client.call(lambda c: c.models.list()) == [expected]
    assert client.call(lambda c: c.models.get("mira")) == expected
