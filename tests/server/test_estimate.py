"""What an estimator remembers, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from running_server import Starter, settings_for

from masquerade_engine.base import Base
from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import InsufficientMemory
from masquerade_server import estimate as estimate_module
from masquerade_server.estimate import Estimator
from masquerade_server.schemas import PersonaBody
from masquerade_server.settings import Settings


async def test_each_kind_of_sculpt_is_asked_for_once_and_few_are_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "_MAX_KNOWN", 3)
    estimator, asked = Estimator(settings), []

    async def ask(spec: dict[str, Any]) -> dict[str, Any]:
        asked.append(spec["sparsity"])
        return {"seconds": spec["sparsity"]}

    monkeypatch.setattr(estimator, "_ask", ask)
    for sparsity in (0.1, 0.2, 0.1, 0.3, 0.4, 0.4):
        found = await estimator.estimate(PersonaBody(name="Mira", text="A keeper.", sparsity=sparsity))
        assert found == {"seconds": sparsity, "memory_bytes": None}
    assert asked == [0.1, 0.2, 0.3, 0.4]
    assert len(estimator._known) == 3


MIRA = {"name": "Mira", "text": "A keeper."}
REFUSED = {
    "refused": {"device": "cpu", "needed_bytes": 21_300_000_000, "available_bytes": 15_200_000_000, "advice": "wait"}
}

IDLE_WORKER = (sys.executable, "-c", "import sys; sys.stdin.read()")


async def test_free_memory_is_looked_at_anew_and_long_texts_are_another_kind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator, asked = Estimator(settings), []

    async def ask(spec: dict[str, Any]) -> dict[str, Any]:
        asked.append((len(spec["text"]) > 1000, spec["behind_others"]))
        return {"seconds": 1.0}

    monkeypatch.setattr(estimator, "_ask", ask)
    await estimator.estimate(PersonaBody(**MIRA))
    await estimator.estimate(PersonaBody(**MIRA | {"text": "Another keeper."}))
    await estimator.estimate(PersonaBody(**MIRA | {"text": "keeper " * 500}))
    await estimator.estimate(PersonaBody(**MIRA), behind_others=True)
    assert asked == [(False, False), (True, False), (False, True)]
    monkeypatch.setattr(estimate_module, "_FRESH_S", 0.0)
    await estimator.estimate(PersonaBody(**MIRA))
    assert len(asked) == 4


async def test_a_refusal_is_raised_each_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = Estimator(settings)

    async def ask(spec: dict[str, Any]) -> dict[str, Any]:
        return REFUSED

    monkeypatch.setattr(estimator, "_ask", ask)
    for _ in range(2):
        with pytest.raises(InsufficientMemory, match=r"about 21.3 GB, this device \(cpu\) has 15.2 GB free"):
            await estimator.estimate(PersonaBody(**MIRA))


def test_nobody_is_asked_where_there_is_plainly_enough(
    settings: Settings, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = PersonaBody(**MIRA)
    for free, workers, wanted in ((64, 1, True), (2, 1, False), (2, 0, True)):
        memory = DeviceMemory(free * 1000**3, 64 * 1000**3)
        monkeypatch.setattr(estimate_module, "host_memory", lambda memory=memory: memory)
        estimator = Estimator(replace(settings, workers=workers))
        assert estimator.need_not_ask(body, tiny_base) is wanted


def test_what_does_not_fit_is_refused_with_409_and_creates_nothing(
    start_server: Starter, tmp_path: Any, tiny_base_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "host_memory", lambda: DeviceMemory(10**9, 10**9))
    running = start_server(settings_for(tmp_path / "data", tiny_base_dir, workers=1), worker_command=IDLE_WORKER)
    answers: list[dict[str, Any]] = [REFUSED]

    async def ask(spec: dict[str, Any]) -> dict[str, Any]:
        return answers[-1]

    monkeypatch.setattr(running.state.estimator, "_ask", ask)
    monkeypatch.setattr(estimate_module, "_FRESH_S", 0.0)
    for body in (MIRA, MIRA | {"dry_run": True}):
        refused = running.client.post("/personas", json=body)
        assert refused.status_code == 409
        assert refused.headers["x-should-retry"] == "false"
        assert refused.json()["error"]["code"] == "insufficient_memory"
        assert "needs about 21.3 GB" in refused.json()["error"]["message"]
    assert running.client.get("/personas/mira").status_code == 404
    assert running.client.post("/personas", json=MIRA | {"sculpt": False}).status_code == 201
    assert running.client.patch("/personas/mira", json={"sparsity": 0.5}).status_code == 409
    assert running.client.get("/personas/mira").json()["sparsity"] == 0.25
    assert running.client.patch("/personas/mira", json={"name": "Mira II", "sculpt": False}).status_code == 200
    answers.append({"seconds": 9.0, "memory_bytes": 5, "plan": {"micro_batch": 2}})
    found = running.client.post("/personas", json=MIRA | {"dry_run": True}).json()
    assert (found["plan"], found["queue_position"]) == ({"micro_batch": 2}, 0)
    assert running.client.patch("/personas/mira", json={"sparsity": 0.5}).status_code == 202
