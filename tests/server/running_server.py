"""A real server on a loopback port: over a tiny base with the real engine, or with an engine that a test scripts."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from masquerade_engine.base import Base
from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_engine.requests import PersonaFunction, Request, TokenOutput, Warmed
from masquerade_masks import FFNShape, Mask, SubNetwork
from masquerade_masks.mask_file import MaskFile, MaskHeader
from masquerade_server.app import create_app
from masquerade_server.backend import open_engine
from masquerade_server.listening import bind
from masquerade_server.publishing import Publication, register
from masquerade_server.serve import ClosingServer
from masquerade_server.settings import Settings
from masquerade_server.state import EngineFactory, ServerState

WAIT_S = 30.0  # for what takes milliseconds on an idle machine


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")


@dataclass
class RunningServer:
    """A server in a thread of its own, and a client of it."""

    url: str
    client: httpx.Client
    server: ClosingServer
    thread: threading.Thread

    @property
    def state(self) -> ServerState:
        """The server's own state, for looking and for playing the worker."""
        state: ServerState = self.server.app.state.server
        return state

    @property
    def base(self) -> Base:
        """The base it serves."""
        return self.state.ready().base

    def chat(self, model: str, text: str = "hi", **fields: Any) -> httpx.Response:
        """One chat turn."""
        return self.client.post(
            "/v1/chat/completions",
            json={"model": model, "messages": [{"role": "user", "content": text}], **fields},
        )

    def stop(self) -> None:
        """As on SIGTERM."""
        self.client.close()
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@contextmanager
def abandoned_post(running: RunningServer, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A POST by a client that leaves without its answer, at the end of the block."""
    host, port = running.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


Starter = Callable[..., RunningServer]


@contextmanager
def servers() -> Iterator[Starter]:
    """`start(settings, engine_factory=..., worker_command=..., wait=True)`; all are stopped at the end."""
    running: list[RunningServer] = []

    def start(
        settings: Settings,
        engine_factory: EngineFactory = open_engine,
        worker_command: Sequence[str] = (),
        *,
        wait: bool = True,
    ) -> RunningServer:
        bound = bind("127.0.0.1", settings.port)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        app = create_app(settings, engine_factory=engine_factory, worker_command=worker_command)
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        server = ClosingServer(config, app)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), name="server")
        thread.start()
        one = RunningServer(url, httpx.Client(base_url=url, timeout=WAIT_S), server, thread)
        running.append(one)
        if wait:
            wait_until(lambda: _is_ready(one), "the server to be ready")
        return one

    try:
        yield start
    finally:
        for one in running:
            if one.thread.is_alive():
                one.stop()


def _is_ready(one: RunningServer) -> bool:
    try:
        return one.client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def settings_for(data_dir: Path, base_dir: Path, **changes: Any) -> Settings:
    """A server's settings over a tiny base, without a worker process."""
    settings = Settings(
        port=0,
        data_dir=data_dir,
        cache_dir=base_dir.parent / "cache",
        model=str(base_dir),
        dtype="fp32",
        device="cpu",
        max_num_seqs=8,
        workers=0,
    )
    return replace(settings, **changes)


# --- masks


def random_subnetwork(base: Base, seed: int, *, sparsity: float = 0.5) -> SubNetwork:
    """Any mask of a base."""
    return subnetwork_of(base.fingerprint, base.shape, seed, sparsity=sparsity)


def subnetwork_of(fingerprint: str, shape: FFNShape, seed: int, *, sparsity: float = 0.5) -> SubNetwork:
    """A random mask that keeps `1 - sparsity` of every layer."""
    kept = round(shape.intermediate_size * (1 - sparsity))
    generator = np.random.default_rng(seed)
    order = generator.random((shape.num_layers, shape.intermediate_size)).argsort(axis=1)
    return SubNetwork(fingerprint, shape, Mask.from_kept_indices(order[:, :kept], shape.intermediate_size))


def mask_file(base: Base, name: str, text: str, seed: int) -> MaskFile:
    """A random mask as a sculpt of this text would write it."""
    header = MaskHeader(
        persona="any",
        version=1,
        recovery="none",
        prompt_sha256=prompt_sha256(persona_system_prompt(name, text)),
        settings={"preset": "smoke", "seed": seed, "sparsity": 0.5},
        created="2026-01-01T00:00:00Z",
    )
    return MaskFile(random_subnetwork(base, seed), header)


def add_version(running: RunningServer, persona_id: str, name: str, text: str, seed: int) -> str:
    """Publish a random mask the way a worker process does; its digest."""
    content = mask_file(running.base, name, text, seed)
    publication = Publication(
        persona_id=persona_id,
        text=text,
        system_prompt=persona_system_prompt(name, text),
        mask_file=content,
        source="sculpt",
        report={"format": "masquerade.report/1", "seed": seed},
        examples=json.dumps({"question": "Tea?", "answer_text": "Aye.", "sensitivity": 0.5}).encode() + b"\n",
    )
    state = running.state
    register(state.registry, state.files, publication, name=name, base=running.base.fingerprint)
    return content.subnetwork.digest


# --- a scripted engine


async def _at_once() -> None: ...


@dataclass
class ScriptedEngine:
    """An engine whose every output a test decides; it keeps what it was asked."""

    script: Callable[[Request], AsyncGenerator[TokenOutput, None]]
    max_model_len: int = 512
    busy: bool = False
    requests: list[Request] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)  # ids of requests whose iterator was closed or ended
    installed: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    warmed: list[tuple[str, tuple[int, ...], bool]] = field(default_factory=list)  # digest, prompt, whether pinned
    warming: Callable[[], Awaitable[None]] = _at_once  # what warming takes
    unwarmed: int = 0  # times that warming was cancelled

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        try:
            async for output in self.script(request):
                yield output
        finally:
            self.closed.append(request.id)

    async def warm(self, function: PersonaFunction, prompt: tuple[int, ...], *, pin: bool = False) -> Warmed:
        self.warmed.append((function.digest, prompt, pin))
        try:
            await self.warming()
        except asyncio.CancelledError:
            self.unwarmed += 1
            raise
        return Warmed(len(prompt), 0)

    def install(self, function: PersonaFunction) -> None:
        self.installed.append(function.digest)

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def residency(self, digest: str) -> str:
        return "dense"

    @property
    def factory(self) -> EngineFactory:
        """What `create_app` takes."""

        @asynccontextmanager
        async def opened(base: Base, settings: Settings) -> AsyncIterator[ScriptedEngine]:
            yield self

        return opened


def token(
    request: Request, text: str, *, finish: Any = None, number: int = 1, token_id: int | None = 65
) -> TokenOutput:
    """One output of a scripted engine."""
    return TokenOutput(
        request_id=request.id,
        token_id=token_id,
        text=text,
        logprob=-0.5,
        top_logprobs=((65, -0.5), (66, -1.5)),
        finish_reason=finish,
        num_prompt_tokens=len(request.prompt),
        num_cached_tokens=0,
        num_output_tokens=number,
    )


async def one_word(request: Request) -> AsyncGenerator[TokenOutput, None]:
    """A script: one word, then the end."""
    yield token(request, "Aye", number=1)
    yield token(request, ".", finish="stop", number=2)


# --- streams


def stream_events(response: httpx.Response) -> list[dict[str, str]]:
    """The server-sent events of a whole body: field name to value."""
    return [_fields(block) for block in response.text.split("\n\n") if block and not block.startswith(":")]


def _fields(block: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in block.split("\n"))


def stream_chunks(response: httpx.Response) -> list[Any]:
    """The JSON of every chunk of a chat stream, which must end with `[DONE]`."""
    data = [one["data"] for one in stream_events(response)]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]
