"""Errors on the wire: one table from error class to status and code, and OpenAI's shape for all of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from masquerade_masks import (
    AttachedNotFound,
    BaseMismatch,
    BaseNotFound,
    ContextTooLong,
    EngineStopped,
    InsufficientMemory,
    JobConflict,
    JobNotFound,
    MaskError,
    MasqueradeError,
    NoMaskYet,
    PersonaExists,
    PersonaNotFound,
    QueueFull,
    SettingError,
    StorageFull,
    UnsupportedModel,
    VersionNotFound,
    WeightsNotLoaded,
    WeightsTooLarge,
)


class Unauthorized(MasqueradeError):
    """The bearer key is missing or is not this server's."""

    def __init__(self) -> None:
        super().__init__("this server needs its API key: send the header `Authorization: Bearer <key>`")


class WrongContentType(MasqueradeError):
    """A body of another media type than the call reads."""

    def __init__(self, found: str | None, wanted: str) -> None:
        said = f"Content-Type is {found!r}" if found else "the Content-Type header is missing"
        super().__init__(f"{said}; send `Content-Type: {wanted}`")
        self.found = found
        self.wanted = wanted


class MalformedBody(MasqueradeError):
    """A body that is not UTF-8, not JSON, or not a JSON object."""


class BodyTooLarge(MasqueradeError):
    """A body over the limit, in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than the limit of {limit} bytes")
        self.limit = limit


class InvalidBody(MasqueradeError):
    """A well-formed body whose fields are wrong; `param` is the first of them."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(MasqueradeError):
    """What was asked for as a model is neither the base nor a persona; `param` is the field that asked."""

    def __init__(self, model: str, message: str, param: str = "model") -> None:
        super().__init__(message)
        self.model = model
        self.param = param


class RouteNotFound(MasqueradeError):
    """No such path."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"there is no {method} {path} here; GET /openapi.json lists every call")


class MethodNotAllowed(MasqueradeError):
    """The path exists, the method does not."""

    def __init__(self, method: str, path: str, allow: str | None) -> None:
        super().__init__(f"{path} does not take {method}" + (f"; it takes {allow}" if allow else ""))
        self.allow = allow


class DamagedFile(MasqueradeError):
    """A file of a published version is gone or is not what was published."""

    def __init__(self, persona_id: str, version: int, what: str) -> None:
        super().__init__(persona_id, version, what)
        self.persona_id = persona_id
        self.version = version
        self.what = what

    def __str__(self) -> str:
        where = f"{self.persona_id!r}, version {self.version}"
        return f"the {self.what} file of {where}, is damaged or gone on the server"


class NothingAttached(MasqueradeError):
    """A version that is a mask alone."""

    def __init__(self, persona_id: str, version: int) -> None:
        super().__init__(persona_id, version)
        self.persona_id = persona_id
        self.version = version

    def __str__(self) -> str:
        return f"version {self.version} of persona {self.persona_id!r} has no attached weights"


class NotReady(MasqueradeError):
    """The base is still being loaded, or could not be."""

    def __init__(self, message: str, *, failed: bool = False) -> None:
        super().__init__(message)
        self.failed = failed


class PromptTooLong(ContextTooLong):
    """The prompt alone leaves no room for an answer."""

    def __str__(self) -> str:
        return f"the prompt takes {self.num_tokens} of the {self.limit} tokens that the context holds"


class GenerationFailed(MasqueradeError):
    """The engine ended a request with an error."""


class DeadlineExceeded(MasqueradeError):
    """The request's own deadline passed before its first token."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"no token came within the {deadline_s:g} s that deadline_s allows")
        self.deadline_s = deadline_s


@dataclass(frozen=True, slots=True)
class Wire:
    """How an error class is answered."""

    status: int
    type: str
    code: str
    param: str | None = None  # where the error itself names no field


_REQUEST = "invalid_request_error"
_SERVER = "server_error"

# The one place where status codes are given. The nearest class in an error's MRO counts.
WIRE: dict[type[MasqueradeError], Wire] = {
    MasqueradeError: Wire(500, _SERVER, "internal_error"),
    SettingError: Wire(400, _REQUEST, "invalid_value"),
    InvalidBody: Wire(400, _REQUEST, "invalid_value"),
    MalformedBody: Wire(400, _REQUEST, "malformed_body"),
    ContextTooLong: Wire(400, _REQUEST, "context_length_exceeded", "messages"),
    MaskError: Wire(400, _REQUEST, "invalid_mask", "mask"),
    BaseMismatch: Wire(400, _REQUEST, "base_mismatch", "mask"),
    AttachedNotFound: Wire(400, _REQUEST, "attached_not_found", "mask"),
    Unauthorized: Wire(401, "authentication_error", "invalid_api_key"),
    RouteNotFound: Wire(404, _REQUEST, "route_not_found"),
    ModelNotFound: Wire(404, _REQUEST, "model_not_found"),
    PersonaNotFound: Wire(404, _REQUEST, "persona_not_found"),
    VersionNotFound: Wire(404, _REQUEST, "version_not_found", "version"),
    NoMaskYet: Wire(404, _REQUEST, "no_mask_yet"),
    NothingAttached: Wire(404, _REQUEST, "nothing_attached", "version"),
    JobNotFound: Wire(404, _REQUEST, "job_not_found"),
    MethodNotAllowed: Wire(405, _REQUEST, "method_not_allowed"),
    PersonaExists: Wire(409, _REQUEST, "persona_exists", "id"),
    JobConflict: Wire(409, _REQUEST, "job_conflict"),
    InsufficientMemory: Wire(409, _REQUEST, "insufficient_memory"),
    BodyTooLarge: Wire(413, _REQUEST, "body_too_large"),
    WrongContentType: Wire(415, _REQUEST, "wrong_content_type"),
    QueueFull: Wire(429, "rate_limit_error", "queue_full"),
    DamagedFile: Wire(500, _SERVER, "damaged_file"),
    GenerationFailed: Wire(500, _SERVER, "generation_failed"),
    BaseNotFound: Wire(500, _SERVER, "base_not_found"),
    UnsupportedModel: Wire(500, _SERVER, "unsupported_model"),
    NotReady: Wire(503, _SERVER, "not_ready"),
    EngineStopped: Wire(503, _SERVER, "engine_stopped"),
    WeightsNotLoaded: Wire(503, _SERVER, "weights_not_loaded"),
    WeightsTooLarge: Wire(503, _SERVER, "weights_too_large"),
    DeadlineExceeded: Wire(504, "deadline_exceeded", "deadline_exceeded", "deadline_s"),
    StorageFull: Wire(507, _SERVER, "storage_full"),
}
RETRY_WHILE_LOADING_S = 2
# Official SDKs retry 408, 409, 429 and 5xx twice; where that is in vain, they are told so.
_HOPELESS = (
    PersonaExists,
    JobConflict,
    InsufficientMemory,
    StorageFull,
    DamagedFile,
    DeadlineExceeded,
    BaseNotFound,
    UnsupportedModel,
    WeightsTooLarge,
)


def wire(error: MasqueradeError) -> Wire:
    """The table's line for an error."""
    return next(WIRE[kind] for kind in type(error).__mro__ if kind in WIRE)


def error_body(error: MasqueradeError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    line = wire(error)
    param = getattr(error, "field", None) or getattr(error, "param", None) or line.param
    return {"error": {"message": _message(error), "type": line.type, "param": param, "code": line.code}}


def _message(error: MasqueradeError) -> str:
    if isinstance(error, StorageFull):  # its own sentence names a path, which is the operator's business
        return "the server's disk is full; nothing was changed"
    return str(error)


def error_headers(error: MasqueradeError) -> dict[str, str]:
    """What the status promises beside the body: Retry-After, Allow, WWW-Authenticate, x-should-retry."""
    headers = {}
    if isinstance(error, QueueFull | WeightsNotLoaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, NotReady) and not error.failed:
        headers["retry-after"] = str(RETRY_WHILE_LOADING_S)
    if isinstance(error, _HOPELESS) or (isinstance(error, NotReady) and error.failed):
        headers["x-should-retry"] = "false"
    if isinstance(error, MethodNotAllowed) and error.allow:
        headers["allow"] = error.allow
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: MasqueradeError) -> JSONResponse:
    """The HTTP answer to an error."""
    return JSONResponse(error_body(error), status_code=wire(error).status, headers=error_headers(error))


def internal_error(request_id: str) -> JSONResponse:
    """The answer to a defect of ours; what happened is in the log under the request id only."""
    return error_response(
        MasqueradeError(f"the server met an unexpected error; its log says more under request id {request_id}")
    )


def invalid_body(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> InvalidBody:
    """One sentence a wrong field, from pydantic's list; `known` are the fields there are."""
    sentences = list(dict.fromkeys(_sentence(one, known) for one in errors))
    shown = sentences[:5] + ([f"and {len(sentences) - 5} more"] if len(sentences) > 5 else [])
    return InvalidBody("; ".join(shown), field_path(errors[0]["loc"]) or None)


def field_path(location: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _sentence(error: Mapping[str, Any], known: Sequence[str]) -> str:
    name = field_path(error["loc"]) or "the body"
    if error["type"] == "extra_forbidden":
        return f"{name[:100]}: unknown field; {_hint(name, known)}"
    if error["type"] == "missing":
        return f"{name}: is required"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}: {said[:1].lower()}{said[1:]}{_given(error)}"


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(sorted(known))}"


def _given(error: Mapping[str, Any]) -> str:
    """The refused value, where it is short and says something."""
    value = error.get("input")
    if not isinstance(value, str | int | float) or len(repr(value)) > 60 or value == "":
        return ""
    return f", got {value!r}"
