"""`POST /v1/chat/completions` and `POST /v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import SettingError
from masquerade_server.bodies import describe_body, json_body
from masquerade_server.generation import (
    answer,
    new_generation,
    reply_head,
    sampling_params,
    token_budget,
)
from masquerade_server.middleware import note
from masquerade_server.openai_shapes import ChatShape, CompletionShape
from masquerade_server.schemas import ChatBody, CompletionBody, screened_chat, screened_completion
from masquerade_server.state import Backend, BackendDep
from masquerade_server.token_bytes import TokenBytes, token_bytes
from masquerade_server.truncation import fitted, prompt_limit

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_server.catalogue import Target

router = APIRouter(tags=["chat"])

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


@router.post("/v1/chat/completions", openapi_extra=describe_body(ChatBody))
async def chat_completions(
    http: Request,
    backend: BackendDep,
    body: Annotated[ChatBody, Depends(json_body(ChatBody, screened_chat))],
) -> Response:
    """Chat with a persona (its id, `id@3` or `id@dense` as `model`), or with the base under its own name."""
    field, wanted = body.wanted_tokens
    logprobs = body.num_logprobs
    target, prompt, num_dropped = await asyncio.to_thread(_chat_prompt, backend, body)
    note(http.scope, f"{target.model} {target.fingerprint}")
    budget = token_budget(len(prompt), backend.engine.max_model_len, field, wanted, default=None)
    sampling = sampling_params(body, budget, logprobs)
    head = reply_head("chatcmpl", target)
    generation = new_generation(
        body=body,
        target=target,
        prompt=prompt,
        sampling=sampling,
        shape=ChatShape(head, _bytes_of(backend.base, logprobs), body.include_usage),
        stop_ids=backend.base.stop_token_ids,
        headers={"x-masquerade-dropped-turns": str(num_dropped)} if num_dropped else None,
    )
    return await answer(http, backend.engine, generation)


@router.post("/v1/completions", openapi_extra=describe_body(CompletionBody))
async def completions(
    http: Request,
    backend: BackendDep,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody, screened_completion))],
) -> Response:
    """Continue a text, under a persona's mask but with no template and no persona prompt."""
    target, prompt = await asyncio.to_thread(_text_prompt, backend, body)
    note(http.scope, f"{target.model} {target.fingerprint}")
    limit = backend.engine.max_model_len
    budget = token_budget(len(prompt), limit, "max_tokens", body.max_tokens, default=_COMPLETION_TOKENS)
    sampling = sampling_params(body, budget, body.logprobs)
    head = reply_head("cmpl", target)
    generation = new_generation(
        body=body,
        target=target,
        prompt=prompt,
        sampling=sampling,
        shape=CompletionShape(head, _bytes_of(backend.base, body.logprobs), body.include_usage),
        stop_ids=backend.base.stop_token_ids,
    )
    return await answer(http, backend.engine, generation)


def _chat_prompt(backend: Backend, body: ChatBody) -> tuple[Target, list[int], int]:
    """What serves the chat, its tokens, and how many turns were dropped for them to fit.

    Raises what `resolve` and `render_chat` raise.
    """
    target = backend.catalogue.resolve(body.model, body.persona)
    messages = [ChatMessage(one.role, one.content) for one in body.messages]

    def render(messages: Sequence[ChatMessage]) -> list[int]:
        return render_chat(backend.base.tokenizer, target.system_prompt, messages)

    if body.truncation != "auto":
        return target, render(messages), 0
    _, wanted = body.wanted_tokens
    return target, *fitted(messages, prompt_limit(backend.engine.max_model_len, wanted), render)


def _text_prompt(backend: Backend, body: CompletionBody) -> tuple[Target, list[int]]:
    """What serves the completion, and its tokens. Raises `SettingError` for unknown token ids."""
    target, base = backend.catalogue.resolve(body.model, body.persona), backend.base
    if isinstance(body.prompt, str):
        return target, list(base.tokenizer(body.prompt)["input_ids"])
    last = base.config.vocab_size - 1
    for token in body.prompt:
        if not 0 <= token <= last:
            raise SettingError("prompt", f"token {token} is not one of 0 to {last}")
    return target, body.prompt


def _bytes_of(base: Base, logprobs: int | None) -> TokenBytes | None:
    """How tokens read among the logprobs; None where none were asked for."""
    return None if logprobs is None else token_bytes(base.tokenizer)
