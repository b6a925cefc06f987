"""`/v1/models` and `/readyz`, as operations: what is served here."""

from __future__ import annotations

from .decode import decode, listed
from .flow import Call, send
from .records import Model, Readiness
from .wire import Request, segment


def list_all() -> Call[list[Model]]:
    """The names that `model` accepts: the base and every persona."""
    payload = (yield from send(Request("GET", "/v1/models"))).json()
    return [decode(Model, one) for one in listed(payload)]


def get(name: str) -> Call[Model]:
    """One of them. Raises NotFound."""
    path = f"/v1/models/{segment(name, 'the model name')}"
    return decode(Model, (yield from send(Request("GET", path))).json())


def ready() -> Call[Readiness]:
    """What the server serves. Raises ServerError (503) while the base is still being loaded."""
    return decode(Readiness, (yield from send(Request("GET", "/readyz"))).json())
