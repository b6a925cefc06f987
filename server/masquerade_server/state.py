"""What a running server holds, and how handlers reach it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import Depends
from starlette.requests import Request as HttpRequest

from masquerade_masks import MasqueradeError
from masquerade_server.errors import NotReady
from masquerade_server.warming import BackgroundWarmer

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_engine.requests import PersonaFunction, Request, TokenOutput, Warmed
    from masquerade_masks.registry import Registry
    from masquerade_masks.store import PersonaFiles
    from masquerade_server.catalogue import Catalogue
    from masquerade_server.changes import ChangeFeed
    from masquerade_server.estimate import Estimator
    from masquerade_server.settings import Settings


class ChatEngine(Protocol):
    """What the server asks of an engine; `masquerade_engine.AsyncEngine` is one."""

    def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """Raises `QueueFull`, `ContextTooLong`, `EngineStopped` before its first output."""
        ...

    async def warm(self, function: PersonaFunction, prompt: tuple[int, ...], *, pin: bool = False) -> Warmed:
        """`install`, and compute a prompt's KV, behind everyone who waits; cancelling it stops that.

        Raises what `generate` raises, and `SettingError` where no more may be pinned.
        """
        ...

    def install(self, function: PersonaFunction) -> None: ...

    def forget(self, digest: str) -> None: ...

    def residency(self, digest: str) -> str: ...

    @property
    def busy(self) -> bool: ...

    @property
    def max_model_len(self) -> int: ...


EngineFactory = Callable[["Base", "Settings"], AbstractAsyncContextManager[ChatEngine]]


@dataclass(frozen=True, slots=True)
class Backend:
    """What exists once the base is loaded."""

    base: Base
    engine: ChatEngine
    catalogue: Catalogue
    started: int  # seconds since the epoch


@dataclass(slots=True)
class ServerState:
    """One server's open registry and files, its backend when that is ready, and its end."""

    settings: Settings
    registry: Registry
    files: PersonaFiles
    changes: ChangeFeed
    estimator: Estimator
    warmer: BackgroundWarmer = field(default_factory=BackgroundWarmer)
    backend: Backend | None = None
    failure: MasqueradeError | None = None  # why there will be no backend
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def close(self) -> None:
        """The end has come: whoever waits for changes lets go."""
        self.closing.set()
        self.changes.wake()

    def ready(self) -> Backend:
        """Raises `NotReady`, saying whether waiting helps."""
        if self.failure is not None:
            raise NotReady(f"the server cannot serve: {self.failure}", failed=True)
        if self.backend is None:
            raise NotReady("the base model is still being loaded; GET /readyz says when it is ready")
        return self.backend


def _state(request: HttpRequest) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _backend(request: HttpRequest) -> Backend:
    return _state(request).ready()


StateDep = Annotated[ServerState, Depends(_state)]
BackendDep = Annotated[Backend, Depends(_backend)]
