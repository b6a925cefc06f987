"""The server with the bundled model and the personas that ship with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from running_server import Starter, add_version, settings_for

from masquerade_server.ready import pruner_data, shipped

pytestmark = pytest.mark.real_model


def test_the_bundled_model_chats_as_ready_and_as_new_personas(
    start_server: Starter, tmp_path: Path, bundled_base: Any
) -> None:
    cache_dir = bundled_base.path.parent.parent
    settings = settings_for(
        tmp_path / "data", tmp_path, model="smollm2-135m-instruct", cache_dir=cache_dir, max_num_seqs=4
    )
    running = start_server(settings)
    ready = [one.id for one in shipped(pruner_data())]
    assert [one["id"] for one in running.client.get("/personas").json()["data"]] == sorted(ready)
    for persona_id in ready:
        persona = running.client.get(f"/personas/{persona_id}").json()
        assert (persona["serving"], persona["version"], persona["warning"]) == ("mask", 1, None)
        reply = running.chat(persona_id, "Who are you?", max_tokens=16).json()
        assert reply["choices"][0]["message"]["content"].strip()
        assert reply["system_fingerprint"].startswith("v1-")
    base = running.chat(running.base.name, "What is two plus two?", max_tokens=16, temperature=0).json()
    assert base["choices"][0]["message"]["content"].strip()
    add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", 1)
    assert running.chat("mira", max_tokens=4).json()["system_fingerprint"].startswith("v1-")
