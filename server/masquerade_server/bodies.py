"""Request bodies: bytes to JSON to a pydantic model, each step refusing in its own words."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from email.message import Message
from typing import Any, Protocol, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from masquerade_server.errors import BodyTooLarge, MalformedBody, WrongContentType, invalid_body

MAX_JSON_BYTES = 2 * 1024 * 1024
MAX_MASK_BYTES = 32 * 1024 * 1024  # gains and biases of a 70B base (80 x 28672) take 14 MiB
_INLINE_BYTES = 64 * 1024  # bodies above are parsed in a thread; 64 KiB parse in under a millisecond

ModelT = TypeVar("ModelT", bound=BaseModel)


class Screen(Protocol):
    """Looks at the raw object before validation; raises or returns what to validate."""

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]: ...


def json_body(
    model: type[ModelT], screen: Screen | None = None, *, optional: bool = False
) -> Callable[[Request], Awaitable[ModelT]]:
    """A dependency that reads a JSON body as `model`; `optional` takes no body at all as `{}`.

    Raises WrongContentType, BodyTooLarge, MalformedBody, InvalidBody, and what `screen` raises.
    """

    async def read(request: Request) -> ModelT:
        raw = await read_limited(request, MAX_JSON_BYTES)
        if optional and not raw:
            return parse(b"{}", model, None)
        _require_json(request)
        if len(raw) <= _INLINE_BYTES:
            return parse(raw, model, screen)
        return await anyio.to_thread.run_sync(parse, raw, model, screen)

    return read


async def read_limited(request: Request, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be over `limit` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise BodyTooLarge(limit)
    pieces = bytearray()
    async for piece in request.stream():
        pieces += piece
        if len(pieces) > limit:
            raise BodyTooLarge(limit)
    return bytes(pieces)


def parse(raw: bytes, model: type[ModelT], screen: Screen | None) -> ModelT:
    """Raises MalformedBody, InvalidBody, and what `screen` raises."""
    payload = _json_object(raw)
    try:
        return model.model_validate(screen(payload) if screen else payload)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise invalid_body(found, list(model.model_fields)) from None


def describe_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` for a route that reads `model` through `json_body`."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": reference}}}}


def _require_json(request: Request) -> None:
    found = request.headers.get("content-type")
    parsed = Message()
    parsed["content-type"] = found or "none/none"
    subtype = parsed.get_content_subtype()
    if parsed.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        # A form or no type at all is also what a web page may post to localhost without asking first.
        raise WrongContentType(found, "application/json")


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise MalformedBody(f"the body is not valid JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise MalformedBody(f"the body is not valid JSON: {error}") from None
    if not isinstance(payload, dict):
        raise MalformedBody("the body must be a JSON object, like {...}")
    if b"\\u" in raw and not _is_text(payload):
        raise MalformedBody("the body holds half of a surrogate pair (\\ud800 to \\udfff), which is not text")
    return payload


def _is_text(payload: dict[str, Any]) -> bool:
    """Whether every string can be written as UTF-8."""
    try:
        json.dumps(payload, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
