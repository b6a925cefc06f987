"""Personas with FFN weights of their own: loaded for their requests, within the budget, with a limit on the wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from masquerade_engine import (
    AsyncEngine,
    Base,
    Engine,
    EngineSettings,
    PersonaFunction,
    Request,
    SamplingParams,
    TokenOutput,
    pack_cache,
)
from masquerade_kernels.packs import Pack, member_pack
from masquerade_masks import AttachedNotFound, SettingError, WeightsNotLoaded, WeightsTooLarge

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ONE_PACK = EngineSettings(max_num_seqs=4, max_model_len=128, pack_cache_bytes=60_000)  # each takes 55,296 bytes

Function = Callable[..., PersonaFunction]
Prompt = Callable[..., tuple[int, ...]]


@pytest.fixture
def engine(tiny_base: Base) -> Iterator[Engine]:
    with Engine(tiny_base, EngineSettings(max_num_seqs=4, max_model_len=128)) as made:
        yield made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Packs of own weights are made once this is set."""
    opened = threading.Event()

    def make(weights: Any, members: Any, *rest: Any) -> Pack:
        if members[0].has_own_ffn:
            assert opened.wait(20)
        return member_pack(weights, members, *rest)

    monkeypatch.setattr(pack_cache, "member_pack", make)
    yield opened
    opened.set()


def run_out(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_requests_wait_for_the_load_while_others_go_on(
    engine: Engine, gate: threading.Event, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    own, plain = make_function(tiny_base, 1, attached="full"), make_function(tiny_base, 2)
    engine.add(Request("own", prompt_of(1), own, GREEDY))
    engine.add(Request("plain", prompt_of(1), plain, GREEDY))
    assert engine.residency(own.digest) == "none"
    seen: list[str] = []
    while "plain" not in seen:
        seen += [output.request_id for output in engine.step() if output.finish_reason]
    assert engine.scheduler.num_waiting == 1
    gate.set()
    assert len(run_out(engine)["own"]) == 6
    assert engine.residency(own.digest) == "compact"


def test_a_request_is_answered_in_words_when_the_limit_has_passed(
    gate: threading.Event, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    settings = EngineSettings(max_num_seqs=2, max_model_len=128, load_timeout_s=0.05)
    own = make_function(tiny_base, 1, attached="full")
    with Engine(tiny_base, settings) as engine:
        engine.add(Request("own", prompt_of(1), own, GREEDY))
        (output,) = run_out(engine)["own"]
        gate.set()
    assert (output.finish_reason, output.token_id) == ("unloaded", None)


async def test_the_async_engine_raises_when_the_limit_has_passed(
    gate: threading.Event, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    own = make_function(tiny_base, 1, attached="full")
    async with AsyncEngine(tiny_base, EngineSettings(max_num_seqs=2, max_model_len=128, load_timeout_s=0.05)) as engine:
        with pytest.raises(WeightsNotLoaded, match=r"within 0.05 s; try again in 5 s"):
            async for _ in engine.generate(Request("own", prompt_of(1), own, GREEDY)):
                pass
        with pytest.raises(WeightsNotLoaded):
            await engine.warm(own, prompt_of(1))
        gate.set()
        while engine.residency(own.digest) != "compact":  # it is made all the same
            await asyncio.sleep(0.005)
        warmed = await engine.warm(own, prompt_of(1))
        assert warmed.num_prompt_tokens == 24


def test_weights_that_cannot_be_made_into_a_pack_end_their_requests(
    engine: Engine,
    tiny_base: Base,
    make_function: Function,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = make_function(tiny_base, 1, attached="full")

    def fail(*arguments: Any) -> Pack:
        raise MemoryError

    monkeypatch.setattr(pack_cache, "member_pack", fail)
    engine.add(Request("own", prompt_of(1), own, GREEDY))
    assert run_out(engine)["own"][0].finish_reason == "unloaded"
    assert "no pack for" in caplog.text
    monkeypatch.undo()
    engine.add(Request("again", prompt_of(1), own, GREEDY))  # the next request tries anew
    assert len(run_out(engine)["again"]) == 6


def test_two_personas_take_turns_where_memory_holds_one(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    owns = [make_function(tiny_base, seed, attached="full") for seed in (1, 2)]
    plain = make_function(tiny_base, 3)
    with Engine(tiny_base, ONE_PACK) as engine:
        requests = [Request(str(i), prompt_of(i), owns[i % 2], GREEDY) for i in range(6)]
        requests += [Request(f"plain {i}", prompt_of(i), plain, GREEDY) for i in range(3)]
        for request in requests[:2]:
            engine.add(request)
        engine.step()
        assert engine.runner.packs.num_bytes <= ONE_PACK.pack_cache_bytes
        together = run_out(engine) | engine.generate_all(requests[2:])
        assert engine.runner.packs.num_bytes <= ONE_PACK.pack_cache_bytes
    for i, own in enumerate(owns):
        with Engine(tiny_base, ONE_PACK) as alone:
            alone.add(Request("alone", prompt_of(i), own, GREEDY))
            expected = [output.token_id for output in run_out(alone)["alone"]]
        assert [output.token_id for output in together[str(i)]] == expected  # type: ignore[union-attr]
    assert set(together) == {request.id for request in requests}


def test_a_busy_persona_does_not_drive_out_weights_that_are_needed(
    gate: threading.Event, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    own, plain = make_function(tiny_base, 1, attached="full"), make_function(tiny_base, 2)
    gate.set()
    with Engine(tiny_base, ONE_PACK) as engine:
        engine.add(Request("own", prompt_of(1), own, replace(GREEDY, max_tokens=60)))
        while engine.residency(own.digest) != "compact":
            engine.step()
        for _ in range(30):
            engine.install(plain)
            engine.step()
            assert engine.residency(own.digest) == "compact"
        assert len(run_out(engine)["own"]) > 0
        for _ in range(5):
            engine.install(plain)  # now it may go
        assert engine.residency(own.digest) == "none"


def test_what_runs_finishes_on_weights_that_are_forgotten(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    own = make_function(tiny_base, 1, attached="full")
    expected = engine.generate_all([Request("before", prompt_of(1), own, GREEDY)])["before"].token_ids
    engine.add(Request("own", prompt_of(1), own, GREEDY))
    engine.step()
    engine.forget(own.digest)
    found = [output.token_id for output in run_out(engine)["own"]]
    assert tuple(found) == expected[-len(found) :]
    assert engine.residency(own.digest) == "none"
    assert engine.runner.packs.num_bytes == 0


def test_weights_that_memory_can_never_hold_are_refused(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    own = make_function(tiny_base, 1, attached="full")
    with Engine(tiny_base, EngineSettings(max_num_seqs=2, pack_cache_bytes=50_000)) as engine:
        with pytest.raises(WeightsTooLarge, match="take 55296 bytes, and packs may take 50000") as refused:
            engine.add(Request("own", prompt_of(1), own, GREEDY))
        assert not engine.has_work
    assert (refused.value.num_bytes, refused.value.limit) == (55_296, 50_000)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attached_weights_that_are_not_loaded_are_refused(
    kind: str, engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1, attached=kind)
    assert function.subnetwork is not None
    bare = replace(function, subnetwork=replace(function.subnetwork, weights=None))
    for call in (lambda: engine.add(Request("a", prompt_of(1), bare, GREEDY)), lambda: engine.install(bare)):
        with pytest.raises(AttachedNotFound):
            call()
    assert not engine.has_work


@pytest.mark.parametrize("kinds", [("lora", None), ("lora", "full")])
def test_no_kv_is_shared_between_one_mask_with_other_weights(
    kinds: tuple[str | None, str | None], tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    first, second = (make_function(tiny_base, 1, attached=kind) for kind in kinds)
    prompt = prompt_of(1, 60)
    with Engine(tiny_base, EngineSettings(max_num_seqs=2)) as alone:
        expected = alone.generate_all([Request("alone", prompt, second, GREEDY)])["alone"].token_ids
    with Engine(tiny_base, EngineSettings(max_num_seqs=2)) as engine:
        engine.generate_all([Request("first", prompt, first, GREEDY)])
        for name, cached in (("second", 0), ("third", 56)):
            engine.add(Request(name, prompt, second, GREEDY))
            outputs = run_out(engine)[name]
            assert outputs[0].num_cached_tokens == cached
            assert tuple(output.token_id for output in outputs) == expected


def test_the_limit_is_a_time() -> None:
    with pytest.raises(SettingError, match="load_timeout_s"):
        EngineSettings(load_timeout_s=0)
