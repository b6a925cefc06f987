"""Prompts and weights made ready ahead: on request, on publishing, and after a start."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from running_server import RunningServer, ScriptedEngine, Starter, abandoned_post, add_version, one_word, wait_until

from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import EngineStopped, SettingError
from masquerade_server.settings import Settings
from masquerade_server.warming import _MAX_ORDERS, BackgroundWarmer


def warm(running: RunningServer, *ids: str, **fields: Any) -> Any:
    response = running.client.post("/personas/warm", json={"ids": list(ids), **fields})
    assert response.status_code == 200, response.text
    payload = response.json()
    assert payload["object"] == "list"
    return payload["data"]


# --- over the real engine


def test_a_warmed_prompt_is_not_computed_again(town: RunningServer) -> None:
    def cached(model: str, text: str) -> int:
        usage = town.chat(model, text, max_tokens=1).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    add_version(town, "dora", "Dora", "Dora mends nets, and counts her knots aloud.", 5)
    town.client.post("/personas/warm", json={"ids": ["dora"]})
    (first,) = warm(town, "dora")
    assert (first["id"], first["version"]) == ("dora", 1)
    assert first["residency"] in ("dense", "compact")
    assert first["cached_tokens"] > first["prompt_tokens"] - 32  # by the call before
    assert cached("dora", "Never said before") >= first["cached_tokens"]
    assert cached("dora@dense", "Never said before") == 0  # another function: another KV


def test_every_way_to_name_a_persona(town: RunningServer) -> None:
    found = warm(town, "mira", "mira@1", "mira@dense", "plain", town.base.name)
    assert [one["id"] for one in found] == ["mira", "mira@1", "mira@dense", "plain", town.base.name]
    assert [one["version"] for one in found] == [2, 1, None, None, None]
    assert [one["residency"] for one in found[2:]] == ["dense"] * 3
    assert found[0]["prompt_tokens"] == found[1]["prompt_tokens"] == found[2]["prompt_tokens"]


def test_warming_counts_no_requests(town: RunningServer) -> None:
    catalogue = town.state.ready().catalogue
    before = catalogue.num_requests("mira")
    warm(town, "mira", "mira@1")
    assert catalogue.num_requests("mira") == before


# --- over an engine that a test scripts


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(one_word)


@pytest.fixture
def running(start_server: Starter, settings: Settings, engine: ScriptedEngine) -> RunningServer:
    running = start_server(settings, engine.factory)
    for name in ("ada", "bela", "cleo"):
        body = {"name": name, "id": name, "text": f"{name} waits.", "sculpt": False}
        assert running.client.post("/personas", json=body).status_code == 201
    return running


def prefix_of_chats(running: RunningServer, persona_id: str) -> list[int]:
    """What two chats with a persona have in common."""
    prompt = running.client.get(f"/personas/{persona_id}").json()["system_prompt"]
    tokenizer = running.base.tokenizer
    a, b = (render_chat(tokenizer, prompt, [ChatMessage("user", text)]) for text in ("a?", "b?"))
    return a[: next(i for i in range(len(a)) if a[i] != b[i])]


def test_the_prefix_of_every_chat_is_warmed(running: RunningServer, engine: ScriptedEngine) -> None:
    found = warm(running, "ada", "bela", pin=True)
    assert [one["prompt_tokens"] for one in found] == [len(prefix_of_chats(running, i)) for i in ("ada", "bela")]
    base = f"base:{running.base.fingerprint}"
    assert sorted(engine.warmed) == sorted(
        (base, tuple(prefix_of_chats(running, one)), True) for one in ("ada", "bela")
    )


def test_nothing_is_warmed_where_one_is_unknown(running: RunningServer, engine: ScriptedEngine) -> None:
    response = running.client.post("/personas/warm", json={"ids": ["ada", "nobody", "bela"]})
    assert response.status_code == 404
    assert "'nobody'" in response.json()["error"]["message"]
    assert engine.warmed == []


def test_what_the_engine_refuses_is_answered_and_stops_the_rest(running: RunningServer, engine: ScriptedEngine) -> None:
    async def third_refused() -> None:
        if len(engine.warmed) == 3:
            raise SettingError("pin", "no more can be pinned")
        await asyncio.sleep(3600)

    engine.warming = third_refused
    response = running.client.post("/personas/warm", json={"ids": ["ada", "bela", "cleo"], "pin": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "pin"
    assert engine.unwarmed == 2


def test_a_client_that_leaves_stops_the_rest(running: RunningServer, engine: ScriptedEngine) -> None:
    async def forever() -> None:
        await asyncio.sleep(3600)

    engine.warming = forever
    with abandoned_post(running, "/personas/warm", {"ids": ["ada", "bela", "cleo"] * 20}):
        wait_until(lambda: len(engine.warmed) == 4, "the first few to begin")
    wait_until(lambda: engine.unwarmed == 4, "them to be stopped")
    assert len(engine.warmed) == 4


def test_a_published_version_is_warmed_and_those_before_are_forgotten(
    running: RunningServer, engine: ScriptedEngine
) -> None:
    first = add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", 1)
    wait_until(lambda: [digest for digest, _, _ in engine.warmed] == [first], "the first to be warmed")
    second = add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", 2)
    wait_until(lambda: [digest for digest, _, _ in engine.warmed] == [first, second], "the second to be warmed")
    assert engine.forgotten == [first]
    assert engine.warmed[1][1] == tuple(prefix_of_chats(running, "mira"))
    assert not engine.warmed[1][2]
    running.client.delete("/personas/mira")
    assert set(engine.forgotten) == {first, second}


def test_a_failure_in_the_background_is_logged_and_the_next_is_warmed(
    running: RunningServer, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        engine.warming = succeed
        raise EngineStopped("its thread failed")

    async def succeed() -> None: ...

    engine.warming = fail
    add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", 1)
    wait_until(lambda: "mira could not be warmed" in caplog.text, "the line in the log")
    add_version(running, "odo", "Odo", "Odo keeps the other one.", 2)
    wait_until(lambda: len(engine.warmed) == 2, "the next to be warmed")


def test_publishing_waits_for_no_warming(running: RunningServer, engine: ScriptedEngine) -> None:
    held = threading.Event()

    async def slow() -> None:
        await asyncio.to_thread(held.wait)

    engine.warming = slow
    digest = add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", 1)
    wait_until(lambda: engine.warmed, "warming to begin")
    fingerprint = running.chat("mira").json()["system_fingerprint"]
    assert fingerprint == f"v1-{digest[:16]}"
    held.set()


def test_personas_are_warm_soon_after_a_start(start_server: Starter, settings: Settings) -> None:
    before = start_server(settings, ScriptedEngine(one_word).factory)
    digest = add_version(before, "mira", "Mira", "Mira keeps a lighthouse.", 1)
    before.stop()
    engine = ScriptedEngine(one_word)
    start_server(settings, engine.factory)
    assert engine.installed == [digest]
    wait_until(lambda: [one for one, _, _ in engine.warmed] == [digest], "the prompt to be warmed")


def test_orders_are_bounded_and_the_latest_stay() -> None:
    warmer = BackgroundWarmer()
    for number in range(_MAX_ORDERS + 10):
        warmer.order(f"p-{number}")
    warmer.order("p-20")
    waiting = list(warmer._orders)
    assert len(waiting) == _MAX_ORDERS
    assert waiting[0] == "p-10"
    assert waiting[-1] == "p-20"
