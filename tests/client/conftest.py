"""One scenario, two clients: `client_of(handler)` drives the blocking and the awaiting client alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from masquerade_client import AsyncMasquerade, Masquerade

Handler = Callable[[httpx.Request], httpx.Response]


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in these pieces; an exception among them is raised in its place."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> Any:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Driver:
    """Runs calls of one kind of client; keeps the requests it sent and the pauses it made."""

    kind: str
    handler: Handler
    options: dict[str, Any]
    requests: list[httpx.Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.handler(request)

    def call(self, do: Callable[[Any], Any]) -> Any:
        """`do(client)` to its result."""
        if self.kind == "sync":
            with self._sync() as client:
                return do(client)

        async def run() -> Any:
            async with self._async() as client:
                return await do(client)

        return asyncio.run(run())

    def iterate(self, do: Callable[[Any], Any], seen: list[Any], limit: int | None = None) -> Any:
        """Iterate over `do(client)`, adding to `seen`; its result, or None after leaving at `limit`."""
        if self.kind == "sync":
            with self._sync() as client, do(client) as stream:
                for value in stream:
                    seen.append(value)
                    if len(seen) == limit:
                        return None
                return stream.result()

        async def run() -> Any:
            async with self._async() as client, do(client) as stream:
                async for value in stream:
                    seen.append(value)
                    if len(seen) == limit:
                        return None
                return await stream.result()

        return asyncio.run(run())

    def _sync(self) -> Masquerade:
        return Masquerade("http://test", transport=httpx.MockTransport(self._handle), **self.options)

    def _async(self) -> AsyncMasquerade:
        return AsyncMasquerade("http://test", transport=httpx.MockTransport(self._handle), **self.options)


@pytest.fixture(params=["sync", "async"])
def client_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    """`client_of(handler, **client options)`; its pauses are recorded and take no time."""
    drivers: list[Driver] = []

    def build(handler: Handler, **options: Any) -> Driver:
        drivers.append(Driver(request.param, handler, options))
        return drivers[-1]

    def pause(seconds: float) -> None:
        drivers[-1].pauses.append(seconds)

    async def async_pause(seconds: float) -> None:
        pause(seconds)

    monkeypatch.setattr("masquerade_client.runners.time.sleep", pause)
    monkeypatch.setattr("masquerade_client.runners.asyncio.sleep", async_pause)
    monkeypatch.delenv("MASQUERADE_URL", raising=False)
    monkeypatch.delenv("MASQUERADE_API_KEY", raising=False)
    return build


@pytest.fixture
def pieces() -> type[Pieces]:
    """The stream class, since test folders are no packages."""
    return Pieces
