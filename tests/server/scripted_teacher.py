"""A small real teacher on a loopback port: an OpenAI-compatible server whose every answer a test decides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from running_server import WAIT_S, wait_until
from starlette.responses import JSONResponse, Response

from masquerade_server.listening import bind

Script = Callable[[int, dict[str, Any]], Awaitable[Response]]  # the request's number from 0, and its body


@dataclass
class ScriptedTeacher:
    """What it was asked, and how to answer."""

    url: str
    script: Script
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)  # the Authorization headers
    at_once: int = 0
    most_at_once: int = 0
    closing: bool = False

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.script(number, body)
        finally:
            self.at_once -= 1

    async def hang(self) -> Response:
        """Answer when the test is over."""
        while not self.closing:
            await asyncio.sleep(0.02)
        return says("too late")


def says(text: str | None, finish: str = "stop") -> Response:
    """A chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return JSONResponse({"object": "chat.completion", "choices": [choice]})


def fails(status: int, message: str = "no", **headers: str) -> Response:
    """An error in OpenAI's shape."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse({"error": {"message": message}}, status, headers=named)


async def agreeable(number: int, body: dict[str, Any]) -> Response:
    """A script: a sentence for everyone."""
    return says(f"Aye, that is so, {number}.")


@contextmanager
def scripted_teachers() -> Iterator[Callable[[Script], ScriptedTeacher]]:
    """`start(script)` starts one; all are stopped at the end."""
    running: list[tuple[ScriptedTeacher, uvicorn.Server, threading.Thread]] = []

    def start(script: Script = agreeable) -> ScriptedTeacher:
        bound = bind("127.0.0.1", 0)
        teacher = ScriptedTeacher(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", script)
        app = FastAPI()
        app.post("/v1/chat/completions", response_model=None)(teacher.answer)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), name="teacher")
        thread.start()
        running.append((teacher, server, thread))
        wait_until(lambda: server.started, "the teacher to listen")
        return teacher

    try:
        yield start
    finally:
        for teacher, server, thread in running:
            teacher.closing = True
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()
