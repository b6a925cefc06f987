"""Operations free of I/O, so that one definition serves `Masquerade` and `AsyncMasquerade`.

An operation is a generator. It yields *effects* (send this, read on, wait) and is sent their outcome; a
runner performs the effects with blocking or awaiting calls and decides nothing. Retries, paging, reconnecting
and parsing are all written in this form, once.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from .errors import APIConnectionError, APIError
from .sse import EventParser, ServerSentEvent
from .wire import Request, Response

T = TypeVar("T")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Send:
    """Perform the request and read its whole answer. Outcome: a Response of any status."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """Perform the request and leave a 2xx body to `Read`, closing the one before. Outcome: a Response."""

    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    """The next bytes of the open body, as they arrive; `b""` at its end."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait. Outcome: None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Emit(Generic[T_co]):
    """Hand a value to whoever iterates over the operation. Outcome: None."""

    value: T_co


Effect: TypeAlias = Send | Open | Read | Pause
Outcome: TypeAlias = Response | bytes | None
# Call[R] ends with an R; Flow[T, R] hands out any number of T before that.
Call: TypeAlias = Generator[Effect, Outcome, R]
Flow: TypeAlias = Generator[Effect | Emit[T], Outcome, R]


def send(request: Request) -> Call[Response]:
    """Raises APIError for every status but 2xx, and APIConnectionError."""
    return _succeeded((yield Send(request)))


def open_stream(request: Request) -> Call[Response]:
    """Like `send`, with the body left to `read_events`."""
    return _succeeded((yield Open(request)))


def _succeeded(outcome: Outcome) -> Response:
    assert isinstance(outcome, Response)
    if not outcome.ok:
        raise outcome.error()
    return outcome


def read_events(parser: EventParser) -> Generator[Read, Outcome, list[ServerSentEvent] | None]:
    """The next events of the open body, at least one; None at its end. Raises APIConnectionError."""
    while True:
        chunk = yield Read()
        assert isinstance(chunk, bytes)
        if not chunk:
            return None
        if events := parser.feed(chunk):
            return events


class Progression(Generic[T, R]):
    """The half of a runner that blocking and awaiting share: advance the generator, keep its result."""

    def __init__(self, flow: Flow[T, R]) -> None:
        self._flow = flow
        self._closed = False
        self._result: tuple[R] | None = None

    @property
    def result(self) -> R:
        """What the operation returned. Raises RuntimeError where it failed or was closed before its end."""
        if self._result is None:
            raise RuntimeError("the operation failed, or was closed before its end: it has no result")
        return self._result[0]

    def advance(self, outcome: Outcome | Exception) -> Effect | Emit[T] | None:
        """Give the last effect's outcome, get the next effect; None at the end. Raises what the flow does."""
        if self._closed:
            return None
        try:
            return self._flow.throw(outcome) if isinstance(outcome, Exception) else self._flow.send(outcome)
        except StopIteration as stop:
            self._result, self._closed = (stop.value,), True
            return None

    def close(self) -> None:
        self._closed = True
        self._flow.close()


def quietly(flow: Flow[T, R]) -> Call[R]:
    """Run `flow` to its end without handing out anything on the way."""
    outcome: Outcome | Exception = None
    progression = Progression(flow)
    while (step := progression.advance(outcome)) is not None:
        outcome = None
        if not isinstance(step, Emit):
            try:
                outcome = yield step
            except APIConnectionError as error:
                outcome = error
    return progression.result


# --- retries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter. A server's `Retry-After` wins, up to `max_retry_after_s`."""

    max_retries: int = 2
    first_delay_s: float = 0.5
    max_delay_s: float = 8.0
    max_retry_after_s: float = 60.0  # asked to wait longer, we hand the error to the caller instead

    def delay_s(self, attempt: int, asked_s: float | None = None) -> float:
        """Seconds before retry number `attempt` (from 0); never shorter than the server asked for."""
        backoff = min(self.max_delay_s, self.first_delay_s * 2.0**attempt)
        jittered: float = backoff * (0.75 + random.random() / 4)
        return max(asked_s or 0.0, jittered)

    def may_retry(self, error: APIError | APIConnectionError, request: Request, header: str | None) -> bool:
        """Whether sending `request` again is safe and may help. `header` is `x-should-retry`."""
        if isinstance(error, APIConnectionError):
            return request.repeatable or not error.delivered
        if (error.retry_after or 0.0) > self.max_retry_after_s or header == "false":
            return False
        # 429 was refused before anything was done, so even a request that must not run twice may be sent
        # again. 409 says that the id is taken or a job runs: asking again changes nothing.
        if error.status == 429 or header == "true":
            return True
        return request.repeatable and (error.status == 408 or error.status >= 500)


def retrying(flow: Flow[T, R], policy: RetryPolicy) -> Flow[T, R]:
    """Run `flow` with each of its requests retried under `policy`; every other effect passes through."""
    outcome: Outcome | Exception = None
    progression = Progression(flow)
    try:
        while (step := progression.advance(outcome)) is not None:
            try:
                outcome = (yield from _attempts(step, policy)) if isinstance(step, Send | Open) else (yield step)
            except APIConnectionError as error:
                outcome = error
        return progression.result
    finally:
        progression.close()


def _attempts(effect: Send | Open, policy: RetryPolicy) -> Call[Response]:
    """Perform one request up to `1 + max_retries` times; the last outcome counts, whatever it is."""
    for attempt in range(policy.max_retries):
        error: APIError | APIConnectionError
        header = None
        try:
            response = yield effect
        except APIConnectionError as lost:
            error = lost
            if not policy.may_retry(error, effect.request, header):
                raise
        else:
            assert isinstance(response, Response)
            if response.ok:
                return response
            error, header = response.error(), response.headers.get("x-should-retry")
            if not policy.may_retry(error, effect.request, header):
                return response
        asked = error.retry_after if isinstance(error, APIError) else None
        yield Pause(policy.delay_s(attempt, asked))
    response = yield effect
    assert isinstance(response, Response)
    return response
