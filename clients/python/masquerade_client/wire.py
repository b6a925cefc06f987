"""Requests and responses as plain data, and how an error is read from a response."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from .errors import APIError, ErrorBody, InvalidResponse, InvalidSetting, error_class


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. `path` starts with a slash and is already quoted."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | bytes | None = None  # a mapping goes as JSON, bytes as they are
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True  # sending it twice does no more than sending it once
    silence_s: float | None = None  # a shorter read timeout than the client's, for answers with a heartbeat


@dataclass(frozen=True, slots=True)
class Response:
    """What came back. Header names are in lower case; a streamed 2xx has its body elsewhere."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Raises InvalidResponse."""
        try:
            return json.loads(self.content)
        except ValueError as error:
            kind = self.headers.get("content-type", "no content type")
            raise InvalidResponse(f"expected JSON, got {kind!r}: is a Masquerade server at this address?") from error

    def error(self) -> APIError:
        """The error this response (not `ok`) stands for."""
        try:
            payload = json.loads(self.content)
        except ValueError:
            payload = None
        return error_class(self.status)(
            read_error_body(payload, f"the server answered with status {self.status}"),
            status=self.status,
            request_id=self.headers.get("x-request-id"),
            retry_after=retry_after_s(self.headers),
        )


def segment(value: str, name: str) -> str:
    """Quote one path segment. Raises InvalidSetting for what would turn into another path."""
    if value in {"", ".", ".."}:
        raise InvalidSetting(f"{name} cannot be {value!r}")
    return quote(value, safe="@")


def read_error_body(payload: Any, fallback: str) -> ErrorBody:
    """Read `{"error": {...}}` out of anything: a proxy in between answers in its own words."""
    error = payload.get("error") if isinstance(payload, dict) else None
    if not isinstance(error, dict):
        return ErrorBody(fallback)
    said = {name: error[name] for name in ("type", "param", "code") if isinstance(error.get(name), str)}
    return ErrorBody(str(error.get("message") or fallback), **said)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After` header, which is a number or a date; None where it is neither."""
    value = headers.get("retry-after", "").strip()
    if value.replace(".", "", 1).isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())
