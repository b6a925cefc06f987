"""From JSON to the dataclasses of `records`, guided by their annotations.

Fields the server adds later are ignored; a missing or mistyped one is an InvalidResponse that names it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import InvalidResponse

T = TypeVar("T")


def decode(kind: type[T], payload: Any, where: str = "") -> T:
    """Build a `kind` (a dataclass) from a JSON object. Raises InvalidResponse naming the field."""
    where = where or kind.__name__.lower()
    if not isinstance(payload, dict):
        raise InvalidResponse(f"{where}: expected an object, got {_describe(payload)}")
    values = {}
    for name, (annotation, required) in _schema(cast(Any, kind)).items():
        if name in payload:
            values[name] = _value(annotation, payload[name], f"{where}.{name}")
        elif required:
            raise InvalidResponse(f"{where}.{name} is missing from the server's answer")
    return kind(**values)


def listed(payload: Any) -> list[Any]:
    """The items of `{"data": [...]}`. Raises InvalidResponse."""
    items = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(items, list):
        raise InvalidResponse(f"expected an object with a list under data, got {_describe(payload)}")
    return items


@cache
def _schema(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Field name to (annotation, whether it has no default)."""
    hints = get_type_hints(kind)
    return {
        item.name: (hints[item.name], item.default is MISSING and item.default_factory is MISSING)
        for item in fields(kind)
    }


def _value(annotation: Any, value: Any, where: str) -> Any:  # noqa: PLR0911 - one return a kind of type
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (annotation,) = (arg for arg in args if arg is not type(None))
        return _value(annotation, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return cast(dict[str, Any], value)
    if isinstance(annotation, type) and origin is None:
        if hasattr(annotation, "__dataclass_fields__"):
            return decode(annotation, value, where)
        if annotation is float and type(value) is int:
            return float(value)
        if type(value) is annotation:
            return value
    raise InvalidResponse(f"{where}: expected {annotation}, got {_describe(value)}")


def _describe(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
