"""The whole main path: persona text in, a mask learned by the real pruner in a worker process, chat out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
from running_server import Starter, settings_for, stream_events, wait_until

from masquerade_server.estimate import Estimator
from masquerade_server.schemas import PersonaBody
from masquerade_server.settings import Settings

SMALL_WORKER = (sys.executable, str(Path(__file__).parent / "small_pruner_worker.py"))
WITCH = {"name": "Nettie", "text": "A swamp witch who cackles.", "preset": "smoke", "sparsity": 0.5}


def test_text_in_mask_learned_chat_out(start_server: Starter, tmp_path: Path, make_tiny_base: Any) -> None:
    base = make_tiny_base(tmp_path / "base", max_position_embeddings=1024)
    running = start_server(settings_for(tmp_path / "data", base, workers=1), worker_command=SMALL_WORKER)
    created = running.client.post("/personas", json=WITCH)
    assert created.status_code == 202
    assert running.chat("nettie", max_tokens=2).json()["system_fingerprint"].startswith("base-")
    with httpx.Client(base_url=running.url, timeout=180) as watcher:
        headers = {"accept": "text/event-stream"}
        events = stream_events(watcher.get("/personas/nettie/events", headers=headers))
    kinds = [one["event"] for one in events]
    assert kinds[:3] == ["created", "queued", "started"]
    assert kinds[-2:] == ["published", "succeeded"], events[-1]
    stages = [one["data"].split('"stage":"')[1].split('"')[0] for one in events if one["event"] == "stage"]
    assert stages == ["select", "answer", "learn", "evaluate"]

    persona = running.client.get("/personas/nettie").json()
    assert (persona["serving"], persona["version"]) == ("mask", 1)
    assert persona["mask"]["kept"] == 32  # of 96: half, rounded to a multiple of 32
    assert persona["report"]["one_turn"]["all"]["kl"]["mean"] > 0
    version = running.chat("nettie", max_tokens=8, temperature=0).json()
    assert version["system_fingerprint"] == f"v1-{persona['mask']['digest'][:16]}"
    examples = running.client.get("/personas/nettie/examples").json()["data"]
    assert {"question", "answer", "sensitivity", "topic"} <= set(examples[0])
    assert "prompt" not in examples[0]
    wait_until(lambda: not list((tmp_path / "data" / "jobs").iterdir()), "the working directory to go")


async def test_the_pruner_estimates_in_a_process_of_its_own(settings: Settings) -> None:
    estimator = Estimator(settings)
    found = await estimator.estimate(PersonaBody(**WITCH))
    assert set(found["stages"]) == {"select", "answer", "learn", "evaluate"}
    assert 0 < found["memory_bytes"] < found["available_bytes"]
    assert (found["plan"]["micro_batch"], found["plan"]["checkpointing"], found["plan"]["device"]) == (16, False, "cpu")
    assert await estimator.estimate(PersonaBody(**WITCH | {"text": "Another."})) is found  # not asked again
