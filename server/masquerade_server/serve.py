"""Running the application on a bound socket, until a signal or until the base cannot be loaded."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from masquerade_masks import MasqueradeError
from masquerade_masks.registry import SQLiteRegistry
from masquerade_server.app import REGISTRY_FILE, create_app
from masquerade_server.listening import bind, url_of

if TYPE_CHECKING:
    from masquerade_server.settings import Settings

__all__ = ["ClosingServer", "bind", "serve", "url_of"]

_GRACE_S = 10  # for replies in flight when the server is told to stop


def serve(settings: Settings, bound: socket.socket, *, on_ready: Callable[[FastAPI], None]) -> None:
    """Serve until a signal; `on_ready` is called once chats are answered.

    Raises the error that kept the base from being loaded, and `SettingError` for an unusable data directory.
    """
    SQLiteRegistry(settings.data_dir / REGISTRY_FILE).close()
    failures: list[MasqueradeError] = []

    def failed(error: MasqueradeError) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=failed)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # `RequestLog` writes a better one
        server_header=False,
        timeout_keep_alive=75,  # above common proxies' 60 s, so that they close idle connections first
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = ClosingServer(config, app)
    with bound:
        asyncio.run(_serve(server, bound, on_ready))
    if failures:
        raise failures[0]


class ClosingServer(uvicorn.Server):
    """Tells the application of the end *before* it waits for streams: watchers then let go.

    The first signal lets replies finish, the second does not.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self.app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked for the second time: what is loading or replying is not waited for
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.server.close()
        await super().shutdown(sockets)


async def _serve(server: ClosingServer, bound: socket.socket, on_ready: Callable[[FastAPI], None]) -> None:
    announcing = asyncio.create_task(_announce(server.app, on_ready))
    try:
        await server.serve(sockets=[bound])
    finally:
        announcing.cancel()


async def _announce(app: FastAPI, on_ready: Callable[[FastAPI], None]) -> None:
    while getattr(app.state, "server", None) is None or app.state.server.backend is None:
        await asyncio.sleep(0.05)
    on_ready(app)
