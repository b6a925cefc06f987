from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from masquerade_engine import (
    AsyncEngine,
    Base,
    Engine,
    EngineSettings,
    PersonaFunction,
    Request,
    SamplingParams,
    Warmed,
)
from masquerade_engine.prefix_index import BLOCK
from masquerade_masks import ContextTooLong, EngineStopped, QueueFull, SettingError

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)

Function = Callable[..., PersonaFunction]
Prompt = Callable[..., tuple[int, ...]]


@pytest.fixture
async def engine(tiny_base: Base) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(tiny_base, EngineSettings(max_num_seqs=4, max_queue=0)) as made:
        yield made


async def collect(engine: AsyncEngine, request: Request) -> list[int | None]:
    return [output.token_id async for output in engine.generate(request)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_streams_run_beside_each_other(
    engine: AsyncEngine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    requests = [Request(str(i), prompt_of(i), make_function(tiny_base, i), GREEDY) for i in range(4)]
    together = await asyncio.gather(*(collect(engine, request) for request in requests))
    assert [len(tokens) for tokens in together] == [8] * 4
    assert await collect(engine, requests[2]) == together[2]
    assert not engine.busy


async def test_the_last_output_says_why(engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    outputs = [output async for output in engine.generate(Request("a", prompt_of(1), base_function, GREEDY))]
    assert [output.finish_reason for output in outputs] == [None] * 7 + ["length"]
    assert outputs[-1].num_output_tokens == 8


async def test_closing_the_iterator_cancels(
    engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    stream = engine.generate(Request("a", prompt_of(1), base_function, LONG))
    await anext(stream)
    assert engine.busy
    await stream.aclose()
    assert not engine.busy
    await until(lambda: engine.stats().num_running == 0)
    assert engine.stats().num_output_tokens < 400


async def test_a_cancelled_task_cancels_its_request(
    engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    task = asyncio.create_task(collect(engine, Request("a", prompt_of(1), base_function, LONG)))
    await until(lambda: engine.stats().num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.stats().num_running == 0)


async def test_a_full_queue_and_a_long_prompt_are_told_to_the_one_who_asked(
    engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    with pytest.raises(ContextTooLong):
        await collect(engine, Request("long", prompt_of(1, 512), base_function, GREEDY))
    streams = [engine.generate(Request(str(i), prompt_of(i), base_function, LONG)) for i in range(4)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(QueueFull):
        await collect(engine, Request("4", prompt_of(4), base_function, GREEDY))
    for stream in streams:
        await stream.aclose()
    await until(lambda: engine.stats().num_running == 0)
    assert len(await collect(engine, Request("5", prompt_of(5), base_function, GREEDY))) == 8


async def test_a_failed_step_reaches_its_clients_and_the_engine_goes_on(
    engine: AsyncEngine,
    base_function: PersonaFunction,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> list[Any]:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(engine._engine.runner, "run", fail)
        outputs = [o async for o in engine.generate(Request("a", prompt_of(1), base_function, GREEDY))]
    assert [output.finish_reason for output in outputs] == ["error"]
    assert "out of luck" in caplog.text
    assert len(await collect(engine, Request("b", prompt_of(1), base_function, GREEDY))) == 8


async def test_stopping_ends_open_streams(tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    async with AsyncEngine(tiny_base, EngineSettings(max_num_seqs=2)) as engine:
        stream = engine.generate(Request("a", prompt_of(1), base_function, LONG))
        await anext(stream)
    with pytest.raises(EngineStopped):
        [output async for output in stream]
    assert not engine.is_running
    with pytest.raises(EngineStopped):
        await collect(engine, Request("b", prompt_of(1), base_function, GREEDY))


async def test_an_engine_thread_that_dies_hangs_nobody(
    tiny_base: Base,
    base_function: PersonaFunction,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def die() -> list[Any]:
        raise SystemExit

    async with AsyncEngine(tiny_base, EngineSettings(max_num_seqs=2)) as engine:
        monkeypatch.setattr(engine._engine, "step", die)
        with caplog.at_level(logging.ERROR), pytest.raises(EngineStopped, match="thread failed"):
            await collect(engine, Request("a", prompt_of(1), base_function, GREEDY))
        with pytest.raises(EngineStopped):
            await collect(engine, Request("b", prompt_of(1), base_function, GREEDY))
    assert "thread has failed" in caplog.text


async def test_an_engine_that_was_not_started_says_so(
    tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    with pytest.raises(EngineStopped, match="not started"):
        await collect(AsyncEngine(tiny_base), Request("a", prompt_of(1), base_function, GREEDY))


async def test_installing_prepares_a_persona(engine: AsyncEngine, tiny_base: Base, make_function: Function) -> None:
    function = make_function(tiny_base, 1)
    engine.install(function)
    await until(lambda: engine.residency(function.digest) == "compact")
    assert engine.stats().num_packs == 1
    assert engine.max_model_len == 512


async def test_warming_says_what_it_found(
    engine: AsyncEngine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    assert await engine.warm(function, prompt_of(1, 50)) == Warmed(50, 0)
    assert await engine.warm(function, prompt_of(1, 50), pin=True) == Warmed(50, 48)
    assert engine.stats().num_pinned_prefix_blocks == 48 // BLOCK
    assert engine.residency(function.digest) != "none"
    outputs = [o async for o in engine.generate(Request("a", prompt_of(1, 50), function, GREEDY))]
    assert outputs[0].num_cached_tokens == 48
    engine.forget(function.digest)
    assert await engine.warm(function, prompt_of(1, 50)) == Warmed(50, 0)
    assert engine.stats().num_pinned_prefix_blocks == 0


async def test_warming_many_at_once_beside_a_chat(
    engine: AsyncEngine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    stream = engine.generate(Request("chat", prompt_of(1), make_function(tiny_base, 9), LONG))
    await anext(stream)
    personas = [make_function(tiny_base, i) for i in range(4)]  # as many as the queue of warming holds
    warmed = await asyncio.gather(*(engine.warm(one, prompt_of(i, 40)) for i, one in enumerate(personas)))
    assert warmed == [Warmed(40, 0)] * 4
    await stream.aclose()


async def test_warming_is_no_chat_and_tells_why_it_cannot_be(
    engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContextTooLong):
        await engine.warm(base_function, prompt_of(1, 512))
    with pytest.raises(SettingError, match="token id outside"):
        await engine.warm(base_function, (10_000,) * 20)

    def fail(*_: Any) -> list[Any]:
        assert not engine.busy
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine._engine.runner, "run", fail)
    with pytest.raises(EngineStopped, match="a step failed"):
        await engine.warm(base_function, prompt_of(1, 50))


async def test_warming_that_is_cancelled_stops(
    engine: AsyncEngine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    streams = [engine.generate(Request(str(i), prompt_of(i), base_function, LONG)) for i in range(4)]
    for stream in streams:
        await anext(stream)
    task = asyncio.create_task(engine.warm(base_function, prompt_of(9, 50)))
    await until(lambda: engine.stats().num_waiting == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.stats().num_waiting == 0)
    for stream in streams:
        await stream.aclose()


async def test_one_thread_loads_and_steps_with_a_number_of_threads_of_its_own(
    tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pool of OpenMP threads would have the first sleep at every barrier."""
    seen: set[tuple[str, int, int]] = set()

    def watched(name: str) -> None:
        call = getattr(Engine, name)

        def watch(self: Engine, *arguments: Any) -> Any:
            seen.add((name, threading.get_ident(), torch.get_num_threads()))
            return call(self, *arguments)

        monkeypatch.setattr(Engine, name, watch)

    watched("__init__")
    watched("step")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        async with AsyncEngine(tiny_base, num_threads=1) as engine:
            await collect(engine, Request("a", prompt_of(1), base_function, GREEDY))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {(name, count) for name, _, count in seen} == {("__init__", 1), ("step", 1)}
    (thread,) = {thread for _, thread, _ in seen}
    assert thread != threading.get_ident()


async def test_what_fails_to_load_is_told(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine, *arguments: Any) -> None:
        raise SettingError("max_model_len", "is too long")

    monkeypatch.setattr(Engine, "__init__", fail)
    with pytest.raises(SettingError, match="too long"):
        async with AsyncEngine(tiny_base):
            pytest.fail("nothing was loaded")
