"""`/v1/chat/completions`, as operations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, Unpack

from .decode import decode
from .errors import APIConnectionError, InvalidResponse, ServerError
from .flow import Call, Emit, Flow, open_stream, read_events, send
from .options import Sampling, checked
from .records import ChatCompletion, Choice, Chunk, Message
from .sse import EventParser
from .wire import Request, Response, read_error_body

Messages: TypeAlias = str | Sequence[Message | Mapping[str, str]]


def complete(persona: str, messages: Messages, **sampling: Unpack[Sampling]) -> Call[ChatCompletion]:
    """A whole reply.

    `persona` is an id, `id@3` (a version), `id@dense` (its prompt on the unpruned base) or the base's name;
    `messages` is the conversation, or a string for one user turn.
    Raises NotFound, BadRequest (`param` names the field), RateLimited (the queue is full).
    """
    response = yield from send(_chat_request(persona, messages, sampling))
    payload = response.json()
    choices = [_whole_choice(one) for one in _choices(payload)]
    if not choices:
        raise InvalidResponse("chat: the reply has no choices")
    counted = {"usage": _usage(payload), "dropped_turns": _dropped_turns(response)}
    return decode(ChatCompletion, {**payload, **choices[0], "choices": choices, **counted}, "chat")


def stream(persona: str, messages: Messages, **sampling: Unpack[Sampling]) -> Flow[Chunk, ChatCompletion]:
    """A reply as it is written: iterate for its pieces, `result()` is the whole; the last chunk has `usage`.

    With `n` above 1 the pieces of all choices come as they are written, each with its `index`.
    Closing the stream early stops the generation. Raises what `complete` raises; a reply that is cut off
    half-way is an APIConnectionError, never a short reply.
    """
    request = _chat_request(persona, messages, sampling, {"stream_options": {"include_usage": True}})
    response = yield from open_stream(request)
    parser, chunks = EventParser(), list[Chunk]()
    while (batch := (yield from read_events(parser))) is not None:
        for sse in batch:
            if sse.data == "[DONE]":
                return _assembled(chunks, _dropped_turns(response))
            chunk = _chunk(sse.data)
            chunks.append(chunk)
            yield Emit(chunk)
    raise APIConnectionError("the reply was cut off before its end")


def _chat_request(
    persona: str, messages: Messages, sampling: Mapping[str, Any], streaming: Mapping[str, Any] | None = None
) -> Request:
    turns = [Message("user", messages)] if isinstance(messages, str) else messages
    body = {
        "model": persona,
        "messages": [
            {"role": turn.role, "content": turn.content} if isinstance(turn, Message) else dict(turn) for turn in turns
        ],
        **checked(Sampling, sampling),
    }
    if streaming is not None:
        body |= {"stream": True, **streaming}
    return Request("POST", "/v1/chat/completions", body=body)  # repeatable: a reply changes nothing


def _choices(payload: Any) -> list[dict[str, Any]]:
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise InvalidResponse("chat: the answer has no list of choices")
    return choices


def _whole_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = decode(Message, choice.get("message"), "message")
    return {**choice, "text": message.content or ""}


def _dropped_turns(response: Response) -> int:
    said = response.headers.get("x-masquerade-dropped-turns", "")
    return int(said) if said.isdecimal() else 0


def _usage(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    usage = payload.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or {}
    return {**usage, "cached_tokens": details.get("cached_tokens") or 0}


def _chunk(data: str) -> Chunk:
    try:
        payload = json.loads(data)
    except ValueError as error:
        raise InvalidResponse(f"chat: a chunk is not JSON: {data[:60]!r}") from error
    if isinstance(payload, dict) and payload.get("error"):
        raise ServerError(read_error_body(payload, "the server failed half-way through the reply"), status=500)
    choice = next(iter(_choices(payload)), {})
    delta = choice.get("delta") or {}
    return decode(Chunk, {**payload, **choice, "text": delta.get("content") or "", "usage": _usage(payload)}, "chunk")


def _assembled(chunks: Sequence[Chunk], dropped_turns: int) -> ChatCompletion:
    if not chunks:
        raise InvalidResponse("chat: the stream held no chunks")
    last = chunks[-1]
    choices = tuple(_assembled_choice(index, chunks) for index in sorted({chunk.index for chunk in chunks}))
    return ChatCompletion(
        id=last.id,
        model=last.model,
        text=choices[0].text,
        finish_reason=choices[0].finish_reason,
        usage=next((chunk.usage for chunk in reversed(chunks) if chunk.usage), None),
        system_fingerprint=last.system_fingerprint,
        choices=choices,
        dropped_turns=dropped_turns,
    )


def _assembled_choice(index: int, chunks: Sequence[Chunk]) -> Choice:
    pieces = [chunk for chunk in chunks if chunk.index == index]
    text = "".join(chunk.text for chunk in pieces)
    return Choice(index, text, next((chunk.finish_reason for chunk in pieces if chunk.finish_reason), None))
