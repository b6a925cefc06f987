"""What surrounds every request: an id, a line in the log, an answer even to our defects, the API key."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from masquerade_server.errors import Unauthorized, error_response, internal_error

log = logging.getLogger("masquerade.http")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # polled every few seconds


class RequestLog:
    """Names each request (`x-request-id`, the client's own where it sent one) and logs it when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = _Record(scope["method"], scope["path"], _request_id(scope))
        scope.setdefault("state", {})["record"] = record

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self.app(scope, receive, named_send)
        except Exception:
            log.exception("%s failed, request id %s", record.call, record.id)
            if record.status is None:
                await internal_error(record.id)(scope, receive, named_send)
        finally:
            log.log(logging.DEBUG if record.path in _QUIET else logging.INFO, "%s", record)


@dataclass(slots=True)
class _Record:
    """One request's line in the log; handlers may append notes."""

    method: str
    path: str
    id: str
    status: int | None = None
    notes: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    @property
    def call(self) -> str:
        return f"{self.method} {repr(self.path)[1:-1]}"[:200]

    def __str__(self) -> str:
        ms = (time.monotonic() - self._started) * 1000
        return " ".join([self.call, str(self.status or "no answer"), f"{ms:.0f} ms", self.id, *self.notes])


def note(scope: Scope, text: str) -> None:
    """Append a few words to the request's line in the log."""
    record = scope.get("state", {}).get("record")
    if record is not None:
        record.notes.append(text)


def request_id(scope: Scope) -> str:
    """The id that `RequestLog` gave the request."""
    record: _Record = scope["state"]["record"]
    return record.id


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


class BearerKey:
    """Where the server has an API key, every call but the probes needs it."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self._expected = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._expected is None or scope["path"] in _QUIET:
            await self.app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._expected):
            await self.app(scope, receive, send)
        else:
            await error_response(Unauthorized())(scope, receive, send)
