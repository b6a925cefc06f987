"""What is sent again, when, and what the caller sees in the end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from masquerade_client import (
    APIConnectionError,
    APIError,
    APITimeout,
    AuthenticationError,
    BadRequest,
    Conflict,
    NotFound,
    RateLimited,
    ServerError,
)
from masquerade_client.flow import RetryPolicy
from masquerade_client.wire import retry_after_s

PERSONA = {"id": "mira", "name": "Mira", "text": "A keeper.", "serving": "base"}


def answers(*given: httpx.Response | Exception) -> Callable[[httpx.Request], httpx.Response]:
    """A handler that gives each of these in turn."""
    rest = list(given)

    def handle(request: httpx.Request) -> httpx.Response:
        answer = rest.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return handle


def failure(status: int, **headers: str) -> httpx.Response:
    error = {"message": "no", "type": "t", "param": "p", "code": "c"}
    return httpx.Response(status, json={"error": error}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def found() -> httpx.Response:
    return httpx.Response(200, json=PERSONA)


@pytest.mark.parametrize(
    "first",
    [
        failure(408),
        failure(429),
        failure(500),
        failure(503),
        failure(409, x_should_retry="true"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
    ],
)
def test_a_get_is_tried_again(client_of: Any, first: Any) -> None:
    client = client_of(answers(first, found()))
    assert client.call(lambda c: c.personas.get("mira")).id == "mira"
    assert len(client.requests) == 2
    assert 0.375 <= client.pauses[0] <= 0.5


@pytest.mark.parametrize(
    "only",
    [
        failure(400),
        failure(404),
        failure(409),
        failure(503, x_should_retry="false"),
        failure(429, retry_after="61"),
    ],
)
def test_what_asking_again_cannot_help(client_of: Any, only: httpx.Response) -> None:
    client = client_of(answers(only))
    with pytest.raises(APIError):
        client.call(lambda c: c.personas.get("mira"))
    assert len(client.requests) == 1


def test_retries_end(client_of: Any) -> None:
    client = client_of(answers(failure(500), failure(502), failure(503)))
    with pytest.raises(ServerError) as caught:
        client.call(lambda c: c.personas.get("mira"))
    assert caught.value.status == 503
    assert client.pauses[1] > client.pauses[0]


def test_retries_can_be_turned_off(client_of: Any) -> None:
    client = client_of(answers(failure(500)), max_retries=0)
    with pytest.raises(ServerError):
        client.call(lambda c: c.personas.get("mira"))


def test_retry_after_is_honoured(client_of: Any) -> None:
    client = client_of(answers(failure(429, retry_after="7"), found()))
    client.call(lambda c: c.personas.get("mira"))
    assert client.pauses == [7.0]


def test_create_sends_one_idempotency_key_however_often_it_is_sent(client_of: Any) -> None:
    created = httpx.Response(202, json={"persona": PERSONA, "job": {"id": "j", "status": "queued"}, "urls": {}})
    client = client_of(answers(httpx.ReadError("reset"), failure(500), created))
    persona = client.call(lambda c: c.personas.create(name="Mira", text="A keeper."))
    assert persona.job.id == "j"
    keys = {request.headers["idempotency-key"] for request in client.requests}
    assert len(client.requests) == 3
    assert len(keys) == 1


@pytest.mark.parametrize("lost", [httpx.ReadError("reset"), httpx.ReadTimeout("slow"), failure(500)])
def test_an_update_that_may_have_arrived_is_not_sent_again(client_of: Any, lost: Any) -> None:
    client = client_of(answers(lost))
    with pytest.raises((APIConnectionError, ServerError)):
        client.call(lambda c: c.personas.update("mira", text="new"))
    assert len(client.requests) == 1


@pytest.mark.parametrize("refused", [httpx.ConnectError("refused"), failure(429)])
def test_an_update_that_was_refused_is_sent_again(client_of: Any, refused: Any) -> None:
    client = client_of(answers(refused, found()))
    client.call(lambda c: c.personas.update("mira", text="new"))
    assert len(client.requests) == 2


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFound),
        (405, APIError),
        (409, Conflict),
        (413, BadRequest),
        (415, BadRequest),
        (422, BadRequest),
        (429, RateLimited),
        (500, ServerError),
        (507, ServerError),
    ],
)
def test_every_status_has_its_error(client_of: Any, status: int, kind: type[APIError]) -> None:
    client = client_of(answers(failure(status, retry_after="3", x_request_id="r-1")), max_retries=0)
    with pytest.raises(kind) as caught:
        client.call(lambda c: c.personas.get("mira"))
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.message, error.type, error.param, error.code) == (status, "no", "t", "p", "c")
    assert (error.request_id, error.retry_after, str(error)) == ("r-1", 3.0, "no")


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"", b"[]", b'{"error": "x"}', b'{"error": {}}'])
def test_an_error_in_a_proxy_s_own_words(client_of: Any, body: bytes) -> None:
    client = client_of(answers(httpx.Response(502, content=body)), max_retries=0)
    with pytest.raises(ServerError, match="status 502"):
        client.call(lambda c: c.personas.get("mira"))


def test_connection_errors_are_ours_and_say_where(client_of: Any) -> None:
    client = client_of(answers(httpx.ConnectError("refused")), max_retries=0)
    with pytest.raises(APIConnectionError, match=r"http://test.*refused.*is the server running") as caught:
        client.call(lambda c: c.personas.get("mira"))
    assert not caught.value.delivered


def test_timeouts_are_connection_errors(client_of: Any) -> None:
    client = client_of(answers(httpx.ReadTimeout("slow")), max_retries=0)
    with pytest.raises(APITimeout) as caught:
        client.call(lambda c: c.personas.get("mira"))
    assert isinstance(caught.value, APIConnectionError)


def test_retry_after_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 <= (retry_after_s({"retry-after": soon}) or 0) <= 30
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0


@pytest.mark.parametrize("value", ["", "soon", "-1", "1.2.3"])
def test_retry_after_that_is_neither(value: str) -> None:
    assert retry_after_s({"retry-after": value}) is None


def test_backoff_grows_to_its_bound() -> None:
    policy = RetryPolicy()
    delays = [policy.delay_s(attempt) for attempt in range(10)]
    assert all(0.375 * 2**n <= delay <= 0.5 * 2**n for n, delay in enumerate(delays[:5]))
    assert max(delays) <= 8.0
