"""Versions with attached weights: published, described, served, downloaded, and installed again."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from running_server import RunningServer, Starter, mask_file, wait_until

from masquerade_engine import AsyncEngine, EngineSettings, pack_cache
from masquerade_engine.base import Base
from masquerade_engine.prompt import persona_system_prompt
from masquerade_kernels.packs import Pack, member_pack
from masquerade_masks import Attached, MaskFile, attached_file
from masquerade_masks.mask_file import encode
from masquerade_server.publishing import Publication, register
from masquerade_server.settings import Settings
from masquerade_server.state import ChatEngine

TEXT = "Mira keeps a lighthouse."

Make = Callable[..., Attached]


@pytest.fixture
def village(start_server: Starter, settings: Settings) -> RunningServer:
    """A server of the test's own, without personas."""
    return start_server(settings)


def content_of(base: Base, make_attached: Make, kind: str, seed: int = 1) -> MaskFile:
    content = mask_file(base, "Mira", TEXT, seed)
    subnetwork = content.subnetwork
    weights = make_attached(kind, subnetwork.shape, subnetwork.mask.kept, seed=seed)
    return MaskFile(replace(subnetwork, weights=weights), replace(content.header, recovery=kind))


def add(village: RunningServer, content: MaskFile, persona_id: str = "mira") -> None:
    """Publish as a worker does."""
    publication = Publication(persona_id, TEXT, persona_system_prompt("Mira", TEXT), content, "sculpt")
    register(village.state.registry, village.state.files, publication, name="Mira", base=village.base.fingerprint)


def create(village: RunningServer, persona_id: str) -> None:
    body = {"name": "Mira", "id": persona_id, "text": TEXT, "sculpt": False}
    assert village.client.post("/personas", json=body).status_code == 201


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attached_weights_are_served_described_and_downloaded(
    kind: str, village: RunningServer, make_attached: Make
) -> None:
    content = content_of(village.base, make_attached, kind)
    weights = content.subnetwork.weights
    assert weights is not None
    add(village, content)
    persona = village.client.get("/personas/mira").json()
    assert persona["serving"] == "mask"
    attached = persona["mask"]["attached"]
    assert (attached["kind"], attached["digest"]) == (kind, weights.digest)
    assert persona["versions"][0]["attached"] == attached
    response = village.client.get("/personas/mira/attached")
    assert (len(response.content), response.headers["etag"]) == (attached["bytes"], f'"{weights.digest}"')
    assert f"mira-v1-{kind}.safetensors" in response.headers["content-disposition"]
    assert attached_file.decode(response.content) == weights
    cached = village.client.get("/personas/mira/attached", headers={"if-none-match": response.headers["etag"]})
    assert (cached.status_code, cached.content) == (304, b"")
    answer = village.chat("mira", max_tokens=12, temperature=0, ignore_eos=True).json()
    assert answer["system_fingerprint"] == f"v1-{content.subnetwork.digest[:16]}"
    add(village, mask_file(village.base, "Mira", TEXT, 1), "plain")
    plain = village.chat("plain", max_tokens=12, temperature=0, ignore_eos=True).json()
    assert plain["choices"][0]["message"]["content"] != answer["choices"][0]["message"]["content"]


def test_a_version_without_attached_weights_has_none_to_download(village: RunningServer) -> None:
    add(village, mask_file(village.base, "Mira", TEXT, 1))
    assert village.client.get("/personas/mira").json()["mask"]["attached"] is None
    response = village.client.get("/personas/mira/attached")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "nothing_attached")


def test_a_mask_with_attached_weights_travels_between_personas(village: RunningServer, make_attached: Make) -> None:
    add(village, content_of(village.base, make_attached, "lora"))
    mask = village.client.get("/personas/mira/mask").content
    create(village, "twin")
    twin = village.client.put("/personas/twin/mask", content=mask).json()
    mira = village.client.get("/personas/mira").json()
    assert twin["mask"] == mira["mask"]
    assert village.client.delete("/personas/mira").status_code in (200, 204)
    assert village.client.get("/personas/twin/attached").status_code == 200
    village.state.ready().catalogue._functions.clear()  # as after a restart
    assert village.chat("twin", max_tokens=1).json()["system_fingerprint"].startswith("v1-")


def test_a_mask_that_names_unknown_weights_is_refused(village: RunningServer, make_attached: Make) -> None:
    content = content_of(village.base, make_attached, "lora")
    create(village, "mira")
    response = village.client.put("/personas/mira/mask", content=encode(content))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "attached_not_found", "mask")
    assert "needs lora weights of digest" in error["message"]
    assert village.client.get("/personas/mira").json()["version"] is None


@pytest.mark.parametrize("recovery", ["none", "full", "lora "])
def test_a_mask_that_contradicts_itself_is_refused(recovery: str, village: RunningServer, make_attached: Make) -> None:
    content = content_of(village.base, make_attached, "lora")
    add(village, content)
    create(village, "twin")
    contradicting = replace(content, header=replace(content.header, recovery=recovery))
    response = village.client.put("/personas/twin/mask", content=encode(contradicting))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_mask")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_attached_weights_are_said_and_the_base_answers(
    damage: str, village: RunningServer, make_attached: Make
) -> None:
    content = content_of(village.base, make_attached, "lora")
    assert content.subnetwork.weights is not None
    add(village, content)
    path = village.state.files.attached_path("mira", 1, content.subnetwork.weights.digest)
    whole = path.read_bytes()
    path.unlink()
    if damage == "flip":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    village.state.ready().catalogue._functions.clear()  # as after a restart
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("base-")
    assert "cannot be served" in village.client.get("/personas/mira").json()["warning"]
    response = village.client.get("/personas/mira/attached")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "damaged_file")


# Weights of one's own that do not come


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


@asynccontextmanager
async def narrow(base: Base, settings: Settings) -> AsyncIterator[ChatEngine]:
    async with AsyncEngine(base, EngineSettings(max_num_seqs=4, pack_cache_bytes=1000)) as engine:
        yield cast(ChatEngine, engine)


@pytest.mark.parametrize("stream", [False, True])
def test_own_weights_that_do_not_come_are_a_503_that_says_when_to_come_back(
    stream: bool, gate: threading.Event, start_server: Starter, settings: Settings, make_attached: Make
) -> None:
    village = start_server(replace(settings, load_timeout_s=1))
    add(village, content_of(village.base, make_attached, "full"))
    response = village.chat("mira", max_tokens=2, stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    error = response.json()["error"]
    assert error["code"] == "weights_not_loaded"
    assert "within 1 s" in error["message"]
    gate.set()  # it is made all the same
    wait_until(lambda: village.client.get("/personas/mira").json()["residency"] == "compact", "the weights")
    assert village.chat("mira", max_tokens=2).status_code == 200


def test_own_weights_that_memory_cannot_hold_are_a_503_without_hope(
    start_server: Starter, settings: Settings, make_attached: Make
) -> None:
    village = start_server(settings, narrow)
    add(village, content_of(village.base, make_attached, "full"))
    response = village.chat("mira", max_tokens=2)
    assert (response.status_code, response.headers["x-should-retry"]) == (503, "false")
    assert response.json()["error"]["code"] == "weights_too_large"


# What a sculpt hands over
