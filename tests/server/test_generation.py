"""What happens around a generation: refusals before it, errors in it, clients that leave, servers that stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import (
    RunningServer,
    ScriptedEngine,
    Starter,
    abandoned_post,
    one_word,
    settings_for,
    stream_chunks,
    token,
    wait_until,
)

from masquerade_engine.requests import Request, TokenOutput
from masquerade_masks import ContextTooLong, EngineStopped, MasqueradeError, QueueFull
from masquerade_server.settings import Settings


def body(running: RunningServer, **fields: Any) -> dict[str, Any]:
    return {"model": running.base.name, "messages": [{"role": "user", "content": "hi"}], **fields}


async def endless(request: Request) -> AsyncGenerator[TokenOutput, None]:
    """A script: words until it is closed."""
    for number in range(1, 10**9):
        yield token(request, "la ", number=number)
        await asyncio.sleep(0.01)


async def silent(request: Request) -> AsyncGenerator[TokenOutput, None]:
    """A script: a request that waits for its turn for ever."""
    await asyncio.sleep(3600)
    yield token(request, "never")


def raising(error: Exception) -> Any:
    """A script: what the engine raises before the first token."""

    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        raise error
        yield  # makes it a generator

    return script


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(256, 1.5), 429, "queue_full"),
        (ContextTooLong(600, 512), 400, "context_length_exceeded"),
        (EngineStopped(), 503, "engine_stopped"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusals_have_a_status_in_streams_as_well(
    start_server: Starter, settings: Settings, error: MasqueradeError, status: int, code: str, stream: bool
) -> None:
    running = start_server(settings, ScriptedEngine(raising(error)).factory)
    response = running.chat(running.base.name, stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 429:
        assert response.headers["retry-after"] == "2"


def test_a_defect_of_ours_is_a_500_in_the_one_shape(
    start_server: Starter, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    running = start_server(settings, ScriptedEngine(raising(ZeroDivisionError("secret"))).factory)
    response = running.chat(running.base.name)
    assert response.status_code == 500
    error = response.json()["error"]
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(("finish", "code"), [("error", "generation_failed"), ("cancelled", "engine_stopped")])
def test_an_error_in_the_middle(start_server: Starter, settings: Settings, finish: str, code: str) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        yield token(request, "Aye")
        yield token(request, "", finish=finish, token_id=None)

    running = start_server(settings, ScriptedEngine(script).factory)
    whole = running.chat(running.base.name)
    assert whole.json()["error"]["code"] == code
    assert whole.status_code in (500, 503)
    *_, last = stream_chunks(running.chat(running.base.name, stream=True))
    assert last["error"]["code"] == code


def test_a_request_reaches_the_engine_as_it_was_asked(start_server: Starter, settings: Settings) -> None:
    engine = ScriptedEngine(one_word)
    running = start_server(settings, engine.factory)
    fields = {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.05,
        "seed": -1,
        "stop": "END",
        "min_tokens": 2,
        "ignore_eos": True,
        "priority": 1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
    }
    assert running.chat(running.base.name, **fields).status_code == 200
    running.chat(running.base.name)
    asked, plain = engine.requests
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.9, 0)
    assert (sampling.seed, sampling.stop, sampling.min_tokens) == (2**63 - 1, ("END",), 2)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.1, -0.5)
    assert (sampling.ignore_eos, sampling.frequency_penalty, sampling.min_p, asked.priority) == (True, 0.25, 0.05, 1)
    assert (plain.sampling.temperature, plain.sampling.seed, plain.priority) == (1.0, None, 0)
    assert plain.sampling.max_tokens == 512 - len(plain.prompt)


def test_held_back_text_makes_no_empty_chunks(start_server: Starter, settings: Settings) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        yield token(request, "")
        yield token(request, "Aye aye", number=2)
        yield token(request, "!", finish="length", number=3)

    running = start_server(settings, ScriptedEngine(script).factory)
    chunks = stream_chunks(running.chat(running.base.name, stream=True))
    assert [one["choices"][0]["delta"].get("content") for one in chunks] == ["", "Aye aye", "!", None]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("script", [endless, silent])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_every_choice(
    start_server: Starter, settings: Settings, script: Any, stream: bool, n: int
) -> None:
    engine = ScriptedEngine(script)
    running = start_server(settings, engine.factory)
    with abandoned_post(running, "/v1/chat/completions", body(running, stream=stream, n=n)) as connection:
        wait_until(lambda: len(engine.requests) == n, "the generations to begin")
        if stream and script is endless:
            assert connection.recv(10)
        assert not engine.closed
    wait_until(lambda: len(engine.closed) == n, "the generations to be closed")


def test_the_real_engine_frees_what_a_leaving_client_held(town: RunningServer) -> None:
    engine, fields = town.state.ready().engine, body(town, stream=True, max_tokens=400, ignore_eos=True)
    left_early = False
    for _ in range(10):  # on a busy machine the reply may end before this thread has its turn
        with town.client.stream("POST", "/v1/chat/completions", json=fields) as response:
            assert next(response.iter_bytes())
            left_early = left_early or engine.busy
        wait_until(lambda: not engine.busy, "the engine to be idle")
        if left_early:
            return
    raise AssertionError("every reply ended before its client could leave")


# --- several choices, and deadlines


def ending(reason: str, *, after: int = 0) -> Any:
    """A script: some words, then an end without a token."""

    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        for number in range(1, after + 1):
            yield token(request, "la ", number=number)
        yield token(request, "", finish=reason, number=after, token_id=None)

    return script


def by_choice(*scripts: Any) -> Any:
    """A script that runs another for each choice, told apart by its seed."""

    def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        assert request.sampling.seed is not None
        chosen: AsyncGenerator[TokenOutput, None] = scripts[request.sampling.seed](request)
        return chosen

    return script


def test_choices_reach_the_engine_as_requests_of_one_prompt(start_server: Starter, settings: Settings) -> None:
    engine = ScriptedEngine(one_word)
    running = start_server(settings, engine.factory)
    last = 2**63 - 1
    assert running.chat(running.base.name, n=3, seed=last, deadline_s=2.5).status_code == 200
    assert [one.sampling.seed for one in engine.requests] == [last, 0, 1]
    assert len({one.prompt for one in engine.requests}) == 1
    assert len({one.id for one in engine.requests}) == 3
    assert {one.deadline_s for one in engine.requests} == {2.5}
    assert len(engine.closed) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_choice_refuses_the_reply_and_ends_the_others(
    start_server: Starter, settings: Settings, stream: bool
) -> None:
    engine = ScriptedEngine(by_choice(silent, raising(QueueFull(256, 1.5)), silent))
    running = start_server(settings, engine.factory)
    response = running.chat(running.base.name, n=3, seed=0, stream=stream)
    assert response.status_code == 429
    assert sorted(engine.closed) == sorted(one.id for one in engine.requests)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_deadline_before_the_first_token(start_server: Starter, settings: Settings, stream: bool, n: int) -> None:
    running = start_server(settings, ScriptedEngine(ending("deadline")).factory)
    response = running.chat(running.base.name, stream=stream, n=n, deadline_s=0.25)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("deadline_exceeded", "deadline_exceeded", "deadline_s")
    assert "0.25 s" in error["message"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_was_late_beside_others_is_empty(start_server: Starter, settings: Settings, stream: bool) -> None:
    scripts = by_choice(ending("deadline"), ending("length", after=2))
    running = start_server(settings, ScriptedEngine(scripts).factory)
    response = running.chat(running.base.name, stream=stream, n=2, seed=0, deadline_s=1)
    assert response.status_code == 200
    if not stream:
        late, other = response.json()["choices"]
        assert (late["message"]["content"], late["finish_reason"]) == ("", "length")
        assert other["message"]["content"] == "la la "
        assert response.json()["usage"]["completion_tokens"] == 2
        return
    endings = [one["choices"][0] for one in stream_chunks(response) if one["choices"][0]["finish_reason"]]
    assert sorted((one["index"], one["finish_reason"]) for one in endings) == [(0, "length"), (1, "length")]


@pytest.mark.parametrize(("finish", "code"), [("error", "generation_failed"), ("cancelled", "engine_stopped")])
def test_an_error_before_the_first_token_has_a_status_in_streams_as_well(
    start_server: Starter, settings: Settings, finish: str, code: str
) -> None:
    running = start_server(settings, ScriptedEngine(ending(finish)).factory)
    for stream in (False, True):
        response = running.chat(running.base.name, stream=stream)
        assert response.status_code in (500, 503)
        assert response.json()["error"]["code"] == code


def test_the_real_engine_keeps_a_deadline(start_server: Starter, settings: Settings) -> None:
    """One slot, taken by a long reply: the second request never has its turn."""
    running = start_server(replace(settings, max_num_seqs=1))
    long = body(running, stream=True, max_tokens=400, ignore_eos=True)
    with running.client.stream("POST", "/v1/chat/completions", json=long) as first:
        assert next(first.iter_bytes())
        response = httpx.post(
            f"{running.url}/v1/chat/completions", json=body(running, deadline_s=0.001, max_tokens=4), timeout=30
        )
    assert response.status_code == 504


# --- before and after the backend


def test_while_the_base_is_loaded_the_server_lives_and_says_so(start_server: Starter, settings: Settings) -> None:
    held = threading.Event()
    engine = ScriptedEngine(one_word)

    class Slow:
        async def __aenter__(self) -> ScriptedEngine:
            await asyncio.to_thread(held.wait)
            return engine

        async def __aexit__(self, *error: object) -> None: ...

    running = start_server(settings, lambda base, settings: Slow(), wait=False)
    wait_until(lambda: _status(running, "/healthz") == 200, "the server to live")
    for path in ("/readyz", "/v1/models", "/personas"):
        response = running.client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "not_ready"
        assert response.headers["retry-after"] == "2"
    held.set()
    wait_until(lambda: _status(running, "/readyz") == 200, "the server to be ready")


def test_a_base_that_cannot_be_loaded_is_told(start_server: Starter, tmp_path: Path, tiny_base_dir: Path) -> None:
    settings = settings_for(tmp_path, tiny_base_dir, model="nowhere.gguf")
    running = start_server(settings, wait=False)
    wait_until(lambda: "nowhere.gguf" in running.client.get("/readyz").text, "the reason")
    response = running.client.get("/readyz")
    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "false"
    assert running.client.get("/healthz").status_code == 200


def test_stopping_lets_replies_finish_and_watchers_go(start_server: Starter, settings: Settings) -> None:
    may_end = threading.Event()

    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        yield token(request, "Aye")
        await asyncio.to_thread(may_end.wait)
        yield token(request, ".", finish="stop", number=2)

    running = start_server(settings, ScriptedEngine(script).factory)
    created = {"name": "Mira", "text": "Mira waits for a worker that never comes."}
    assert running.client.post("/personas", json=created).status_code == 202
    with httpx.Client(base_url=running.url, timeout=30) as other, httpx.Client(base_url=running.url) as third:
        headers = {"accept": "text/event-stream"}
        fields = body(running, stream=True)
        with (
            third.stream("GET", "/personas/mira/events", headers=headers) as watching,
            other.stream("POST", "/v1/chat/completions", json=fields) as talking,
        ):
            lines, news = talking.iter_lines(), watching.iter_lines()
            next(line for line in lines if "Aye" in line)
            next(line for line in news if "queued" in line)
            stopping = threading.Thread(target=running.stop)
            stopping.start()
            list(news)  # the watcher's stream ends by itself, while the reply is still being written
            may_end.set()
            rest = "".join(lines)
        assert '"finish_reason":"stop"' in rest
        assert "[DONE]" in rest
        stopping.join(20)
        assert not stopping.is_alive()


def test_stopping_lets_the_real_engine_finish(start_server: Starter, settings: Settings) -> None:
    running = start_server(settings)
    fields = body(running, stream=True, max_tokens=200, ignore_eos=True)
    with (
        httpx.Client(base_url=running.url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=fields) as response,
    ):
        pieces = response.iter_text()
        next(pieces)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        rest = "".join(pieces)
    stopping.join(60)
    assert '"finish_reason":"length"' in rest
    assert "error" not in rest


def _status(running: RunningServer, path: str) -> int | None:
    try:
        return running.client.get(path).status_code
    except httpx.TransportError:
        return None
