"""The client's error tree. It mirrors the server's: one root, and a leaf for each thing a caller can act on.

`str(error)` is a sentence that can be shown to a user.
"""

from __future__ import annotations

from dataclasses import dataclass


class MasqueradeError(Exception):
    """Root of everything this package raises on purpose."""


class InvalidSetting(MasqueradeError, ValueError):
    """A client setting or an argument that can never work, found before anything was sent."""


class InvalidResponse(MasqueradeError):
    """The server answered with something this client cannot read: another service, or a newer server."""


class APIConnectionError(MasqueradeError):
    """No answer: refused, reset or cut off half-way.

    `delivered` is False where the request certainly never reached the server.
    """

    def __init__(self, message: str, *, delivered: bool = True) -> None:
        super().__init__(message)
        self.delivered = delivered


class APITimeout(APIConnectionError):
    """The server did not answer within the client's timeout."""


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """An error in the server's own words: `{"error": {"message", "type", "param", "code"}}`."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | None = None


class APIError(MasqueradeError):
    """The server answered with an error. `param` names the field it complains about, where there is one."""

    def __init__(
        self,
        body: ErrorBody,
        *,
        status: int,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(body.message)
        self.status = status
        self.message = body.message
        self.type = body.type
        self.param = body.param
        self.code = body.code
        self.request_id = request_id
        self.retry_after = retry_after
        """Seconds the server asks to wait, from `Retry-After`."""


class BadRequest(APIError):
    """400, 413, 415, 422: the request itself is wrong."""


class AuthenticationError(APIError):
    """401, 403: the key is missing, unknown or not allowed to do this."""


class NotFound(APIError):
    """404: no such persona, version, mask or model."""


class Conflict(APIError):
    """409: the id is taken, or a job of this persona is already running."""


class RateLimited(APIError):
    """429: a queue is full. `retry_after` says when to come back."""


class ServerError(APIError):
    """5xx, or an error sent in the middle of a stream (which has no status line; `status` is then 500)."""


class SculptFailed(MasqueradeError):
    """The sculpt job ended in failure; an earlier version, if any, still serves."""

    def __init__(self, persona_id: str, reason: str) -> None:
        super().__init__(f"sculpting {persona_id!r} failed: {reason}")
        self.persona_id = persona_id
        self.reason = reason


class SculptCancelled(MasqueradeError):
    """The sculpt job was cancelled; an earlier version, if any, still serves."""

    def __init__(self, persona_id: str) -> None:
        super().__init__(f"sculpting {persona_id!r} was cancelled")
        self.persona_id = persona_id


_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequest,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFound,
    409: Conflict,
    413: BadRequest,
    415: BadRequest,
    422: BadRequest,
    429: RateLimited,
}


def error_class(status: int) -> type[APIError]:
    """The leaf for an HTTP status."""
    return ServerError if status >= 500 else _BY_STATUS.get(status, APIError)
