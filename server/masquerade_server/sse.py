"""Server-sent events: how an event is written, and a response that closes what it streams."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Send

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still here\n\n"  # a comment: keeps proxies from closing a quiet stream


def encode_json(payload: Any) -> str:
    """Compact JSON; what JSON lacks is an error, never `NaN` on the wire."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(payload: Any, *, type: str | None = None, id: int | None = None) -> bytes:
    """One event. JSON holds no raw newline, so the data is always one line."""
    head = f"id: {id}\n" if id is not None else ""
    head += f"event: {type}\n" if type is not None else ""
    return f"{head}data: {encode_json(payload)}\n\n".encode()


class EventStream(StreamingResponse):
    """Streams an async generator and closes it at once when the client goes away."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        source: AsyncGenerator[Any, None] | None = None,
    ) -> None:
        """`source` is what `events` reads: it is closed even where `events` never came to start."""
        # X-Accel-Buffering: nginx would otherwise hold tokens back.
        quiet = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=quiet | dict(headers or {}))
        self._closing = [one for one in (events, source) if one is not None]

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            for generator in self._closing:
                await generator.aclose()
