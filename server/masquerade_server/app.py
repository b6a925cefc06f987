"""The application: routes, errors, and the lifetimes of everything behind them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from masquerade_masks import MasqueradeError
from masquerade_masks.registry import SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server import __version__
from masquerade_server.activity import activity_file, beat
from masquerade_server.api import routers
from masquerade_server.backend import open_backend, open_engine, replace_served
from masquerade_server.changes import ChangeFeed
from masquerade_server.errors import (
    MalformedBody,
    MethodNotAllowed,
    RouteNotFound,
    error_response,
    invalid_body,
)
from masquerade_server.estimate import Estimator
from masquerade_server.jobs import WORKER_COMMAND, WorkerSupervisor
from masquerade_server.middleware import BearerKey, RequestLog
from masquerade_server.schemas import ChatBody, CompletionBody, PersonaBody, PersonaPatch, RollbackBody, WarmBody
from masquerade_server.state import Backend, EngineFactory, ServerState

if TYPE_CHECKING:
    from masquerade_masks.registry import Event
    from masquerade_server.settings import Settings

log = logging.getLogger("masquerade.app")

REGISTRY_FILE = "registry.sqlite"
_BODIES = (ChatBody, CompletionBody, PersonaBody, PersonaPatch, RollbackBody, WarmBody)
_SERVED_ANEW = frozenset({"published", "serving"})


def _log_failure(error: MasqueradeError) -> None:
    log.error("%s", error)


def create_app(
    settings: Settings,
    *,
    engine_factory: EngineFactory = open_engine,
    worker_command: Sequence[str] = WORKER_COMMAND,
    on_failure: Callable[[MasqueradeError], None] = _log_failure,
) -> FastAPI:
    """A server for one data directory.

    It answers `/healthz` at once and everything else when the base is loaded; where that fails,
    `on_failure` is told and `/readyz` says why. `worker_command` starts the sculpt worker.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _running(settings, engine_factory, worker_command, on_failure) as state:
            app.state.server = state
            yield

    app = FastAPI(title="Masquerade", version=__version__, lifespan=lifespan, redirect_slashes=False)
    for router in routers():
        app.include_router(router)
    _answer_errors(app)
    app.add_middleware(BearerKey, api_key=settings.api_key)
    app.add_middleware(RequestLog)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _running(
    settings: Settings,
    engine_factory: EngineFactory,
    worker_command: Sequence[str],
    on_failure: Callable[[MasqueradeError], None],
) -> AsyncIterator[ServerState]:
    """Open what needs no model, and load the rest behind it."""
    async with AsyncExitStack() as stack:
        registry = await asyncio.to_thread(SQLiteRegistry, settings.data_dir / REGISTRY_FILE)
        stack.callback(registry.close)
        replacing: set[asyncio.Task[None]] = set()

        def served_anew(event: Event) -> None:
            if state.backend is not None and event.type in _SERVED_ANEW:
                task = asyncio.create_task(_replace_served(state, event))
                replacing.add(task)
                task.add_done_callback(replacing.discard)

        changes = ChangeFeed(registry, served_anew)
        files = PersonaFiles(settings.data_dir)
        state = ServerState(settings, registry, files, changes, Estimator(settings))
        ended = asyncio.Event()  # replies in flight have finished: `state.closing` comes before that
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(changes.follow()),
                tasks.create_task(beat(activity_file(settings.data_dir), lambda: _busy(state))),
            ]
            serving = tasks.create_task(_serve_backend(state, ended, engine_factory, worker_command, on_failure))
            try:
                yield state
            finally:
                state.close()
                ended.set()
                if state.backend is None and state.failure is None:
                    log.warning("the model is still being loaded; Ctrl-C again stops without waiting for it")
                for task in background:
                    task.cancel()
                await serving


async def _serve_backend(
    state: ServerState,
    ended: asyncio.Event,
    engine_factory: EngineFactory,
    worker_command: Sequence[str],
    on_failure: Callable[[MasqueradeError], None],
) -> None:
    """Hold the backend, and the worker process beside it, open until the server has ended."""
    try:
        async with open_backend(state, engine_factory) as backend:
            state.backend = backend
            async with _warming(state, backend), WorkerSupervisor(state.settings, state.registry, worker_command):
                await ended.wait()
            state.backend = None
    except MasqueradeError as error:
        state.failure = error
        on_failure(error)
    except Exception as error:
        log.exception("the base could not be loaded")
        state.failure = MasqueradeError(f"loading the base failed: {error}")
        on_failure(state.failure)


@asynccontextmanager
async def _warming(state: ServerState, backend: Backend) -> AsyncIterator[None]:
    """Carry out the warmer's orders meanwhile."""
    task = asyncio.create_task(state.warmer.run(backend))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _replace_served(state: ServerState, event: Event) -> None:
    with suppress(MasqueradeError):  # deleted meanwhile, or a mask that the catalogue has already reported
        if (backend := state.backend) is not None:
            await asyncio.to_thread(replace_served, backend, state, event)
            state.warmer.order(event.persona_id)


def _busy(state: ServerState) -> bool:
    return state.backend is not None and state.backend.engine.busy


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape, FastAPI's and starlette's own included."""

    @app.exception_handler(MasqueradeError)
    async def known(request: Request, error: MasqueradeError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Path, query and header parameters: bodies are read by `json_body`. The first part says which kind.
        found = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
        return error_response(invalid_body(found, ()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:200]
        if error.status_code == 404:
            return error_response(RouteNotFound(request.method, path))
        if error.status_code == 405:
            return error_response(MethodNotAllowed(request.method, path, _allowed(request)))
        return error_response(MalformedBody(str(error.detail)))


def _allowed(request: Request) -> str:
    """The methods of every route of the path: starlette names those of the first alone."""
    methods: set[str] = set()
    for route in (route for router in routers() for route in router.routes):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= set(getattr(route, "methods", None) or ())
    return ", ".join(sorted(methods))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the bodies that `json_body` reads."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description="Personas as sub-networks of one base model, behind an OpenAI-compatible API.",
            routes=app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in _BODIES:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema
