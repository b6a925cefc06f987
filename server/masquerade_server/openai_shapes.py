"""OpenAI's response objects: whole replies and stream chunks of the two generation calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from masquerade_engine.requests import TokenOutput
    from masquerade_server.token_bytes import TokenBytes

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every object of one reply repeats."""

    id: str
    created: int  # seconds since the epoch
    model: str  # as the client named it
    system_fingerprint: str  # version and digest: SDKs hide headers


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished answer of a reply."""

    text: str
    tokens: Sequence[TokenOutput]  # where logprobs were asked for
    finish_reason: str


class ReplyShape(Protocol):
    """How one of the two calls words a reply. The chunks of each choice come as opening, pieces, ending."""

    @property
    def head(self) -> ReplyHead: ...

    @property
    def bytes_of(self) -> TokenBytes | None:
        """None: no logprobs were asked for."""
        ...

    def opening(self, index: int) -> list[Json]: ...

    def piece(self, index: int, text: str, tokens: Sequence[TokenOutput]) -> Json: ...

    def ending(self, index: int, finish_reason: str) -> Json: ...

    def usage_chunk(self, usage: Json) -> Json: ...

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json: ...


def usage_of(lasts: Sequence[TokenOutput]) -> Json:
    """OpenAI's `usage` from the last output of every choice: their prompt is one and counts once."""
    num_prompt = lasts[0].num_prompt_tokens
    num_output = sum(last.num_output_tokens for last in lasts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": min(last.num_cached_tokens for last in lasts)},
    }


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`chat.completion` and `chat.completion.chunk`."""

    head: ReplyHead
    bytes_of: TokenBytes | None
    include_usage: bool = False

    def opening(self, index: int) -> list[Json]:
        """The role chunk."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def piece(self, index: int, text: str, tokens: Sequence[TokenOutput]) -> Json:
        return self._chunk(index, {"content": text}, self._logprobs(tokens), None)

    def ending(self, index: int, finish_reason: str) -> Json:
        return self._chunk(index, {}, None, finish_reason)

    def usage_chunk(self, usage: Json) -> Json:
        return _object(self.head, "chat.completion.chunk") | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        worded = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return _object(self.head, "chat.completion") | {"choices": worded, "usage": usage}

    def _choice(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = _object(self.head, "chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _logprobs(self, tokens: Sequence[TokenOutput]) -> Json | None:
        if self.bytes_of is None:
            return None
        return {"content": [self._token(one, self.bytes_of) for one in tokens], "refusal": None}

    def _token(self, output: TokenOutput, bytes_of: TokenBytes) -> Json:
        token_id, logprob = _sampled(output)
        alternatives = [_logprob(bytes_of(other), value) for other, value in output.top_logprobs]
        return _logprob(bytes_of(token_id), logprob) | {"top_logprobs": alternatives}


@dataclass(slots=True)
class CompletionShape:
    """`text_completion`, whole and as chunks; counts characters for `text_offset`."""

    head: ReplyHead
    bytes_of: TokenBytes | None
    include_usage: bool = False
    _offsets: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by choice

    def opening(self, index: int) -> list[Json]:
        """Text completions have no role chunk."""
        return []

    def piece(self, index: int, text: str, tokens: Sequence[TokenOutput]) -> Json:
        return self._chunk(_text_choice(index, text, self._logprobs(index, tokens), None))

    def ending(self, index: int, finish_reason: str) -> Json:
        return self._chunk(_text_choice(index, "", None, finish_reason))

    def usage_chunk(self, usage: Json) -> Json:
        return _object(self.head, "text_completion") | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        worded = [
            _text_choice(index, one.text, self._logprobs(index, one.tokens), one.finish_reason)
            for index, one in enumerate(choices)
        ]
        return _object(self.head, "text_completion") | {"choices": worded, "usage": usage}

    def _chunk(self, choice: Json) -> Json:
        chunk = _object(self.head, "text_completion") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _logprobs(self, index: int, tokens: Sequence[TokenOutput]) -> Json | None:
        if self.bytes_of is None:
            return None
        texts, offsets = [], []
        for one in tokens:
            texts.append(token_text(self.bytes_of(_sampled(one)[0])))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(texts[-1])
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [_ranked(one, self.bytes_of) for one in tokens],
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


def token_text(token: bytes) -> str:
    """A token as text; one that is a part of a character, which no string holds, as the replacement character."""
    return token.decode("utf-8", "replace")


def _text_choice(index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(token: bytes, logprob: float) -> Json:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}


def _ranked(output: TokenOutput, bytes_of: TokenBytes) -> Json:
    """Text to log-probability of the likeliest tokens and, whether or not it is one of them, the sampled one."""
    ranked: Json = {}
    for token_id, logprob in (*output.top_logprobs, _sampled(output)):
        ranked.setdefault(token_text(bytes_of(token_id)), logprob)  # of two that read alike, the likelier
    return ranked


def _sampled(output: TokenOutput) -> tuple[int, float]:
    assert output.token_id is not None
    assert output.logprob is not None
    return output.token_id, output.logprob
