"""The remote teacher's HTTP: an OpenAI-compatible chat endpoint as the pruner's `ChatModel`.

For the worker and the command line alone: it imports the pruner, which the request path never does.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import httpx
from pydantic import BaseModel, ValidationError

from masquerade_masks import TeacherError
from masquerade_pruner.rewriting import Chat, Reply
from masquerade_server.settings import TeacherSettings
from masquerade_server.teacher_cache import TeacherCache

log = logging.getLogger("masquerade.teacher")

CACHE_FILE = "teacher.sqlite"  # in the data directory
TRIES = 8  # of one request, over about two minutes: a server that loads a model is back by then
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_LONGEST_ASKED_S = 600.0  # a teacher that asks for more has run out of something that waiting does not bring
_CONNECT_S = 10.0
_LOOK_S = 0.25  # between two looks for a cancellation

_RETRIED = frozenset({408, 409, 429})  # and 5xx, as the official SDKs do
_ENDED = frozenset({"stop", "eos", "eos_token", "end_turn"})
# Some endpoints refuse fields that others need: what they name in a 400 is left out, or goes by its other name.
_OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
_FILTERED = re.compile(r"content[_ ](?:filter|management|policy)", re.IGNORECASE)
_LOGGED_CHARS = 500


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class RemoteTeacher:
    """An endpoint and the cache of its replies; a context manager."""

    def __init__(self, settings: TeacherSettings, data_dir: Path, *, first_wait_s: float = _FIRST_WAIT_S) -> None:
        """Raises `SettingError` for an unusable data directory."""
        self._settings = settings
        self._first_wait_s = first_wait_s
        self._cache = TeacherCache(data_dir / CACHE_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache.__exit__(kind, error, trace)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._settings.model

    @property
    def digest(self) -> str:
        """sha256 of address and model."""
        return hashlib.sha256(f"{self._settings.url}\x00{self._settings.model}".encode()).hexdigest()

    def replies(
        self, chats: Sequence[Chat], *, usable: Callable[[Reply], bool], between: Callable[[], None]
    ) -> Generator[Reply, None, None]:
        """Replies from the cache first, then from the endpoint, several requests at a time.

        Runs an event loop of its own whenever it is asked for the next reply: not to be used inside another.
        """
        keys = {chat.id: self._key(chat) for chat in chats}
        waiting: deque[Chat] = deque()
        for chat in chats:
            between()
            if (known := self._cache.get(keys[chat.id])) is None:
                waiting.append(chat)
            else:
                yield Reply(chat.id, known[0], cast(Literal["stop", "length", "refused"], known[1]))
        if not waiting:
            return
        with asyncio.Runner() as runner:
            endpoint = _Endpoint(self._settings, self._first_wait_s)
            try:
                while waiting or endpoint.busy:
                    between()
                    replies, failure = runner.run(endpoint.some(waiting))
                    for reply in replies:
                        if usable(reply):
                            self._cache.put(keys[reply.chat_id], reply.text, reply.finish)
                    yield from replies
                    if failure is not None:
                        raise failure
            finally:
                runner.run(endpoint.aclose())

    def _key(self, chat: Chat) -> str:
        asked = {name: value for name, value in asdict(chat).items() if name != "id"}
        content = {"url": self._settings.url, "model": self._settings.model, **asked}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Trouble(Exception):
    """Why a try failed, in words that follow "the teacher at <host>"; another may not."""

    def __init__(self, words: str, *, status: int | None = None, asked_s: float | None = None) -> None:
        super().__init__(words)
        self.words = words
        self.status = status
        self.asked_s = asked_s  # what Retry-After says


class _Endpoint:
    """The asynchronous half: requests under way on one event loop."""

    def __init__(self, settings: TeacherSettings, first_wait_s: float) -> None:
        self._settings = settings
        self._first_wait_s = first_wait_s
        headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_S),  # the whole of a request has a limit of its own
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        self._running: set[asyncio.Task[Reply]] = set()
        self._declined: set[str] = set()
        self._num_answered = 0
        self._open_at = 0.0  # on the loop's clock: nobody asks before, since one was told to wait

    @property
    def busy(self) -> bool:
        return bool(self._running)

    async def some(self, waiting: deque[Chat]) -> tuple[list[Reply], BaseException | None]:
        """Replies that have come, after a moment or at the first, and what ended a request for good."""
        while waiting and len(self._running) < self._settings.concurrency:
            self._running.add(asyncio.create_task(self._reply(waiting.popleft())))
        done, self._running = await asyncio.wait(self._running, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        failures = [task.exception() for task in done]
        replies = [task.result() for task, failure in zip(done, failures, strict=True) if failure is None]
        return replies, next((failure for failure in failures if failure is not None), None)

    async def aclose(self) -> None:
        """Give up on what is under way."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.aclose()

    async def _reply(self, chat: Chat) -> Reply:
        """One chat's reply, tried again where that may help. Raises `TeacherError`."""
        tries = 0
        while True:
            num_answered = self._num_answered
            await self._gate()
            try:
                reply = await self._ask(chat)
            except _Trouble as trouble:
                # A rate limit that lets others through meanwhile is no outage.
                tries = 1 if trouble.status == 429 and self._num_answered > num_answered else tries + 1
                await self._wait(tries, trouble)
            else:
                self._num_answered += 1
                return reply

    async def _gate(self) -> None:
        while (left := self._open_at - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left)

    async def _wait(self, tries: int, trouble: _Trouble) -> None:
        """Until the next try. Raises `TeacherError` where there is to be none."""
        asked_s = trouble.asked_s or 0.0
        if tries >= TRIES:
            raise self._error(f"{trouble.words}, {TRIES} times in a row; sculpt again when it answers")
        if asked_s > _LONGEST_ASKED_S:
            raise self._error(f"{trouble.words} and asks to wait {asked_s:.0f} s; sculpt again then")
        seconds = max(asked_s, backoff_s(tries, self._first_wait_s) * random.uniform(0.5, 1.0))
        log.warning("the teacher at %s %s; trying again in %.1f s", self._settings.host, trouble.words, seconds)
        if asked_s:
            self._open_at = max(self._open_at, asyncio.get_running_loop().time() + asked_s)
        await asyncio.sleep(seconds)

    async def _ask(self, chat: Chat) -> Reply:
        """One request. Raises `_Trouble` where another may fare better, `TeacherError` where it will not."""
        body = self._body(chat)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._client.post(f"{self._settings.url}/chat/completions", json=body)
        except TimeoutError:
            raise _Trouble(f"gave no answer within {self._settings.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Trouble(f"cannot be reached ({type(error).__name__})") from None
        status = response.status_code
        if response.is_success:
            return _reply_of(chat, response)
        if status in _RETRIED or status >= 500:
            raise _Trouble(f"answered {status}", status=status, asked_s=_asked_s(response))
        if status in (400, 422):
            if _FILTERED.search(response.text):
                return Reply(chat.id, "", "refused")
            if declined := {name for name in _OPTIONAL if name in body and re.search(rf"\b{name}\b", response.text)}:
                log.info("the teacher at %s takes no %s", self._settings.host, ", ".join(sorted(declined)))
                self._declined |= declined
                return await self._ask(chat)
        said = self._without_key(response.text[:_LOGGED_CHARS])
        log.warning("the teacher at %s answered %d: %s", self._settings.host, status, said)
        raise self._error(_hopeless_words(status))

    def _body(self, chat: Chat) -> dict[str, Any]:
        optional: dict[str, Any] = {
            "max_tokens": chat.max_tokens,
            "temperature": chat.temperature,
            "seed": chat.seed,
        }
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": chat.prompt}],
        }
        for name, value in optional.items():
            sent = _OPTIONAL[name] if name in self._declined else name
            if sent is not None:
                body[sent] = value
        return body

    def _error(self, words: str) -> TeacherError:
        return TeacherError(f"the teacher at {self._settings.host} {words}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._settings.api_key, "***") if self._settings.api_key else text


def backoff_s(tries: int, first_s: float) -> float:
    """The longest wait after so many failed tries: doubling, up to a minute."""
    return min(first_s * 2.0 ** (tries - 1), _LONGEST_WAIT_S)


def _reply_of(chat: Chat, response: httpx.Response) -> Reply:
    try:
        choice = _Completion.model_validate_json(response.content).choices[0]
    except (ValidationError, IndexError):
        raise _Trouble(f"answered {response.status_code} with no chat completion") from None
    if choice.finish_reason == "content_filter":
        return Reply(chat.id, "", "refused")
    return Reply(chat.id, choice.message.content or "", "stop" if choice.finish_reason in _ENDED else "length")


def _asked_s(response: httpx.Response) -> float | None:
    """Retry-After in seconds, which a server gives as a number or as a date."""
    given = response.headers.get("retry-after")
    if given is None:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # neither; or a date without a zone
        return None


def _hopeless_words(status: int) -> str:
    words = f"answered {status}"
    if status in (401, 403):
        return f"{words}: it does not take the key; the operator sets teacher_api_key"
    if status == 404:
        return (
            f"{words}: no such call or model; the operator sets teacher_url (mostly it ends in /v1) and teacher_model"
        )
    return f"{words}, which asking again does not mend; the server's log says more"
