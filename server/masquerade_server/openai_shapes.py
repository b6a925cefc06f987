"""OpenAI's response objects: whole replies and stream chunks of the two generation calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from masquerade_engine.requests import TokenOutput

Json = dict[str, Any]
Decode = Callable[[int], str]  # a token id as text


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every object of one reply repeats."""

    id: str
    created: int  # seconds since the epoch
    model: str  # as the client named it
    system_fingerprint: str  # version and digest: SDKs hide headers


class ReplyShape(Protocol):
    """How one of the two calls words a reply. Chunks come as opening, pieces, ending."""

    @property
    def head(self) -> ReplyHead: ...

    def opening(self) -> list[Json]: ...

    def piece(self, text: str, tokens: Sequence[TokenOutput]) -> Json: ...

    def ending(self, finish_reason: str) -> Json: ...

    def usage_chunk(self, usage: Json) -> Json: ...

    def whole(self, text: str, tokens: Sequence[TokenOutput], finish_reason: str, usage: Json) -> Json: ...


def usage_of(last: TokenOutput) -> Json:
    """OpenAI's `usage` from a request's last output."""
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_output_tokens,
        "total_tokens": last.num_prompt_tokens + last.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": last.num_cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    head: ReplyHead
    decode: Decode | None  # None: no logprobs were asked for
    include_usage: bool = False

    def opening(self) -> list[Json]:
        """The role chunk."""
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def piece(self, text: str, tokens: Sequence[TokenOutput]) -> Json:
        return self._chunk({"content": text}, self._logprobs(tokens), None)

    def ending(self, finish_reason: str) -> Json:
        return self._chunk({}, None, finish_reason)

    def usage_chunk(self, usage: Json) -> Json:
        return _object(self.head, "chat.completion.chunk") | {"choices": [], "usage": usage}

    def whole(self, text: str, tokens: Sequence[TokenOutput], finish_reason: str, usage: Json) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }
        return _object(self.head, "chat.completion") | {"choices": [choice], "usage": usage}

    def _chunk(self, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = _object(self.head, "chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _logprobs(self, tokens: Sequence[TokenOutput]) -> Json | None:
        if self.decode is None:
            return None
        return {"content": [self._token(one) for one in tokens], "refusal": None}

    def _token(self, output: TokenOutput) -> Json:
        assert self.decode is not None
        assert output.token_id is not None
        assert output.logprob is not None
        alternatives = [_logprob(self.decode(token), logprob) for token, logprob in output.top_logprobs]
        return _logprob(self.decode(output.token_id), output.logprob) | {"top_logprobs": alternatives}


@dataclass(slots=True)
class CompletionShape:
    """`text_completion`, whole and as chunks; counts characters for `text_offset`."""

    head: ReplyHead
    decode: Decode | None
    include_usage: bool = False
    _offset: int = 0

    def opening(self) -> list[Json]:
        """Text completions have no role chunk."""
        return []

    def piece(self, text: str, tokens: Sequence[TokenOutput]) -> Json:
        return self._chunk(text, self._logprobs(tokens), None)

    def ending(self, finish_reason: str) -> Json:
        return self._chunk("", None, finish_reason)

    def usage_chunk(self, usage: Json) -> Json:
        return _object(self.head, "text_completion") | {"choices": [], "usage": usage}

    def whole(self, text: str, tokens: Sequence[TokenOutput], finish_reason: str, usage: Json) -> Json:
        choice = _text_choice(text, self._logprobs(tokens), finish_reason)
        return _object(self.head, "text_completion") | {"choices": [choice], "usage": usage}

    def _chunk(self, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        chunk = _object(self.head, "text_completion") | {"choices": [_text_choice(text, logprobs, finish_reason)]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _logprobs(self, tokens: Sequence[TokenOutput]) -> Json | None:
        if self.decode is None:
            return None
        texts, offsets = [], []
        for one in tokens:
            assert one.token_id is not None
            texts.append(self.decode(one.token_id))
            offsets.append(self._offset)
            self._offset += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.decode(token): logprob for token, logprob in one.top_logprobs} for one in tokens],
            "text_offset": offsets,
        }


def model_object(model_id: str, created: int, *, root: str, parent: str | None = None) -> Json:
    """One entry of `/v1/models`; `parent` is the base a persona is a sub-network of."""
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "masquerade",
        "root": root,
        "parent": parent,
    }


def _object(head: ReplyHead, kind: str) -> Json:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _text_choice(text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(token: str, logprob: float) -> Json:
    # A token may be a part of a character, which no string holds; its bytes are then unknown.
    return {
        "token": token,
        "logprob": logprob,
        "bytes": None if "\ufffd" in token else list(token.encode()),
    }
