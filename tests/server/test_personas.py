"""The `/personas` calls over a real registry; the tests play the worker."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from running_server import (
    RunningServer,
    Starter,
    add_version,
    mask_file,
    stream_chunks,
    stream_events,
    wait_until,
)

from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import MasqueradeError, StorageFull
from masquerade_masks.mask_file import decode, encode
from masquerade_masks.registry import Job
from masquerade_server.publishing import Publication, publish
from masquerade_server.settings import Settings

MIRA = {"name": "Mira", "text": "Mira keeps a lighthouse."}


@pytest.fixture
def village(start_server: Starter, settings: Settings) -> RunningServer:
    """A server of the test's own, without personas."""
    return start_server(settings)


def create(village: RunningServer, **fields: Any) -> dict[str, Any]:
    response = village.client.post("/personas", json=MIRA | fields)
    assert response.status_code in (201, 202), response.text
    persona: dict[str, Any] = response.json()["persona"]
    return persona


def claim(village: RunningServer) -> Job:
    job = village.state.registry.claim_job("tester", 60.0)
    assert job is not None
    return job


def finish(village: RunningServer, job: Job, seed: int = 1) -> None:
    """Publish a random mask for a claimed job, as a worker does."""
    name, text = job.spec["name"], job.spec["text"]
    content = mask_file(village.base, name, text, seed)
    prompt = persona_system_prompt(name, text)
    publication = Publication(job.persona_id, text, prompt, content, "sculpt", {"seed": seed}, b"")
    publish(village.state.registry, village.state.files, publication, job_id=job.id, worker="tester")


def sculpted(village: RunningServer, seed: int = 1, **fields: Any) -> dict[str, Any]:
    """A persona with a published version."""
    persona_id = create(village, **fields)["id"]
    finish(village, claim(village), seed)
    return get(village, persona_id)


def get(village: RunningServer, persona_id: str) -> dict[str, Any]:
    persona: dict[str, Any] = village.client.get(f"/personas/{persona_id}").json()
    return persona


# --- create


def test_a_job_never_looks_done_without_its_version(village: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    create(village)
    running = claim(village)
    registry = village.state.registry
    latest_job = registry.latest_job

    def ends_meanwhile(persona_id: str) -> Any:
        if not registry.get_job(running.id).is_final:
            finish(village, running)
        return latest_job(persona_id)

    monkeypatch.setattr(registry, "latest_job", ends_meanwhile)
    seen = village.client.get("/personas/mira").json()
    assert (seen["job"]["status"], seen["version"], len(seen["versions"])) == ("succeeded", 1, 1)


def test_creating_answers_with_persona_job_and_urls(village: RunningServer) -> None:
    response = village.client.post("/personas", json=MIRA | {"preset": "smoke", "seed": 3})
    assert response.status_code == 202
    assert response.headers["location"] == "/personas/mira"
    answer = response.json()
    assert answer["urls"] == {
        "self": "/personas/mira",
        "events": "/personas/mira/events",
        "cancel": "/personas/mira/cancel",
    }
    assert answer["job"] == answer["persona"]["job"]
    assert (answer["job"]["status"], answer["job"]["queue_position"]) == ("queued", 0)
    persona = answer["persona"]
    assert persona == get(village, "mira")
    wanted = {"id", "name", "text", "system_prompt", "cast", "serving", "version", "versions", "job"}
    wanted |= {"sparsity", "recovery", "mask", "residency", "created", "updated"}
    assert wanted <= set(persona)
    assert (persona["serving"], persona["version"], persona["mask"]) == ("base", None, None)
    assert persona["system_prompt"].startswith("You are Mira. Mira keeps a lighthouse.")
    assert claim(village).spec == MIRA | {
        "sparsity": 0.25,
        "recovery": "none",
        "teacher": "base",
        "preset": "smoke",
        "seed": 3,
    }


def test_a_persona_answers_at_once_and_from_its_mask_once_published(village: RunningServer) -> None:
    create(village)
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("base-")
    finish(village, claim(village))
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("v1-")
    persona = get(village, "mira")
    assert (persona["serving"], persona["version"], persona["job"]["status"]) == ("mask", 1, "succeeded")
    assert persona["mask"]["kept"] == 48
    assert persona["report"] == {"seed": 1}


def test_ids_are_made_from_names(village: RunningServer) -> None:
    made = [create(village, name=name, sculpt=False)["id"] for name in ("Élise d'Arc", "Élise d'Arc!", "李明")]
    assert made[:2] == ["elise-d-arc", "elise-d-arc-2"]
    assert made[2].startswith("persona-")
    assert create(village, name=village.base.name, sculpt=False)["id"] == f"{village.base.name}-2"


def test_without_sculpt_nothing_is_queued(village: RunningServer) -> None:
    assert create(village, sculpt=False)["job"] is None
    assert village.state.registry.claim_job("tester", 1.0) is None


def test_an_idempotency_key_replays(village: RunningServer) -> None:
    headers = {"idempotency-key": "k1"}
    first = village.client.post("/personas", json=MIRA, headers=headers)
    again = village.client.post("/personas", json=MIRA, headers=headers)
    assert again.status_code == 202
    assert again.json()["job"]["id"] == first.json()["job"]["id"]
    assert len(village.client.get("/personas").json()["data"]) == 1
    other = village.client.post("/personas", json=MIRA | {"seed": 9}, headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["param"] == "Idempotency-Key"
    long = village.client.post("/personas", json=MIRA, headers={"idempotency-key": "k" * 300})
    assert long.status_code == 400


def test_a_dry_run_creates_nothing(village: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    create(village)

    async def asked(spec: dict[str, Any]) -> dict[str, Any]:
        assert "dry_run" not in spec
        return {"seconds": 600.0, "memory_bytes": 10}

    monkeypatch.setattr(village.state.estimator, "_ask", asked)
    response = village.client.post("/personas", json=MIRA | {"id": "other", "dry_run": True})
    assert response.status_code == 200
    assert response.json() == {"seconds": 600.0, "memory_bytes": 10, "queue_position": 1}
    assert [one["id"] for one in village.client.get("/personas").json()["data"]] == ["mira"]
    bad = village.client.post("/personas", json=MIRA | {"text": "x " * 500, "dry_run": True})
    assert bad.json()["error"]["param"] == "text"


# --- list


def test_lists_are_paged_by_cursor_and_filtered_by_cast(village: RunningServer) -> None:
    for number in range(5):
        create(village, name=f"P{number}", sculpt=False, cast="even" if number % 2 == 0 else "odd")
    seen, after = [], None
    while True:
        page = village.client.get("/personas", params={"limit": 2} | ({"after": after} if after else {})).json()
        assert len(page["data"]) <= 2
        seen += [one["id"] for one in page["data"]]
        if (after := page["next"]) is None:
            break
    assert seen == [f"p{number}" for number in range(5)]
    even = village.client.get("/personas", params={"cast": "even"}).json()
    assert [one["id"] for one in even["data"]] == ["p0", "p2", "p4"]
    assert even["next"] is None


# --- change


def test_a_new_text_is_served_when_its_version_is_published(village: RunningServer) -> None:
    before = sculpted(village)
    response = village.client.patch("/personas/mira", json={"text": "Mira hates the sea."})
    assert response.status_code == 202
    meanwhile = response.json()["persona"]
    assert (meanwhile["version"], meanwhile["system_prompt"]) == (1, before["system_prompt"])
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("v1-")
    job = claim(village)
    assert job.spec["text"] == "Mira hates the sea."
    conflict = village.client.patch("/personas/mira", json={"seed": 5})
    assert conflict.status_code == 409
    assert conflict.json()["error"]["code"] == "job_conflict"
    finish(village, job, seed=2)
    after = get(village, "mira")
    assert (after["version"], after["text"]) == (2, "Mira hates the sea.")
    assert "hates the sea" in after["system_prompt"]


def test_a_failed_second_version_leaves_the_first(village: RunningServer) -> None:
    sculpted(village)
    village.client.patch("/personas/mira", json={"sparsity": 0.5})
    village.state.registry.finish_job(claim(village).id, "failed", "the disk is full", worker="tester")
    persona = get(village, "mira")
    assert (persona["version"], persona["serving"], persona["job"]["status"]) == (1, "mask", "failed")
    assert persona["job"]["error"] == "the disk is full"
    again = village.client.patch("/personas/mira", json={"sculpt": True})
    assert again.status_code == 202
    assert claim(village).spec["sparsity"] == 0.5


def test_a_patch_that_changes_nothing_sculpts_nothing(village: RunningServer) -> None:
    sculpted(village)
    for patch in ({}, {"text": MIRA["text"]}, {"sculpt": False}):
        response = village.client.patch("/personas/mira", json=patch)
        assert response.status_code == 200
    assert village.state.registry.claim_job("tester", 1.0) is None


def test_keeping_the_mask_beside_a_new_text_flags_it(village: RunningServer) -> None:
    sculpted(village)
    patch = {"text": "Mira hates the sea.", "sculpt": False}
    response = village.client.patch("/personas/mira", json=patch)
    assert response.status_code == 200
    persona = response.json()["persona"]
    assert (persona["flagged"], persona["version"]) == (True, 1)
    assert "hates the sea" in persona["system_prompt"]
    assert "another text" in persona["warning"]
    back = village.client.patch("/personas/mira", json={"text": MIRA["text"], "sculpt": False})
    assert (back.json()["persona"]["flagged"], back.json()["persona"]["warning"]) == (False, None)


def test_a_text_changed_before_the_first_mask_takes_effect_at_once(village: RunningServer) -> None:
    create(village, sculpt=False)
    village.client.patch("/personas/mira", json={"text": "Mira hates the sea."})
    assert "hates the sea" in get(village, "mira")["system_prompt"]
    assert claim(village).spec["text"] == "Mira hates the sea."


def test_rollback(village: RunningServer) -> None:
    for seed, text in ((1, "Mira is calm."), (2, "Mira is wild.")):
        add_version(village, "mira", "Mira", text, seed)
    assert village.client.post("/personas/mira/rollback").json()["version"] == 1
    persona = get(village, "mira")
    assert "calm" in persona["system_prompt"]
    assert persona["text"] == "Mira is calm."
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("v1-")
    nothing_before = village.client.post("/personas/mira/rollback", json={})
    assert nothing_before.status_code == 404
    assert village.client.post("/personas/mira/rollback", json={"version": 2}).json()["version"] == 2


def test_deleting(village: RunningServer) -> None:
    sculpted(village)
    create(village, name="Other", id="other")
    assert village.client.delete("/personas/mira").status_code == 200
    assert village.chat("mira").status_code == 404
    assert [one["id"] for one in village.client.get("/personas").json()["data"]] == ["other"]
    assert not (village.state.settings.data_dir / "personas" / "mira").exists()
    village.client.delete("/personas/other")
    assert village.state.registry.claim_job("tester", 1.0) is None
    assert create(village)["version"] is None  # the id may be taken again


def test_cancelling_a_queued_sculpt(village: RunningServer) -> None:
    create(village)
    assert village.client.post("/personas/mira/cancel").json()["job"]["status"] == "cancelled"
    assert village.state.registry.claim_job("tester", 1.0) is None
    assert village.client.post("/personas/mira/cancel").status_code == 409


# --- swapping under load


def test_a_stream_across_a_swap_finishes_on_its_version(village: RunningServer) -> None:
    add_version(village, "mira", "Mira", MIRA["text"], 1)
    fields = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}
    alone = village.chat("mira", **fields).json()
    seen: list[httpx.Response] = []
    talking = threading.Thread(target=lambda: seen.append(village.chat("mira", stream=True, **fields)))
    talking.start()
    wait_until(lambda: village.state.ready().engine.busy, "the stream to begin")
    published = time.monotonic()
    add_version(village, "mira", "Mira", MIRA["text"], 2)
    fresh = village.chat("mira", max_tokens=1).json()
    assert fresh["system_fingerprint"].startswith("v2-")
    assert time.monotonic() - published < 20
    talking.join()
    chunks = stream_chunks(seen[0])
    assert {one["system_fingerprint"] for one in chunks} == {alone["system_fingerprint"]}
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
    assert text == alone["choices"][0]["message"]["content"]


def test_a_deletion_lets_a_stream_finish(village: RunningServer) -> None:
    add_version(village, "mira", "Mira", MIRA["text"], 1)
    fields = {"max_tokens": 60, "ignore_eos": True, "stream": True}
    body = {"model": "mira", "messages": [{"role": "user", "content": "hi"}], **fields}
    with village.client.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_text()
        next(pieces)
        with httpx.Client(base_url=village.url) as other:
            assert other.delete("/personas/mira").status_code == 200
        rest = "".join(pieces)
    assert '"finish_reason":"length"' in rest
    assert rest.endswith("data: [DONE]\n\n")


def test_a_publish_is_warmed_before_anyone_asks(village: RunningServer) -> None:
    digest = add_version(village, "mira", "Mira", MIRA["text"], 1)
    wait_until(lambda: village.state.ready().engine.residency(digest) != "none", "the version to be installed")


# --- masks, reports, examples


def test_masks_travel(village: RunningServer) -> None:
    digest = sculpted(village)["mask"]["digest"]
    response = village.client.get("/personas/mira/mask")
    assert response.headers["etag"] == f'"{digest}"'
    assert "mira-v1.safetensors" in response.headers["content-disposition"]
    assert decode(response.content).subnetwork.digest == digest
    cached = village.client.get("/personas/mira/mask", headers={"if-none-match": f'"{digest}"'})
    assert (cached.status_code, cached.content) == (304, b"")

    create(village, name="Mira", id="twin", sculpt=False)
    twin = village.client.put("/personas/twin/mask", content=response.content).json()
    assert (twin["version"], twin["mask"]["digest"], twin["flagged"]) == (1, digest, False)
    assert twin["versions"][0]["source"] == "upload"
    assert village.client.get("/personas/twin/report").json() is None
    assert village.client.get("/personas/twin/examples").json() == {"data": []}

    create(village, id="stranger", text="Somebody else.", sculpt=False)
    stranger = village.client.put("/personas/stranger/mask", content=response.content).json()
    assert stranger["flagged"]
    assert "another text" in stranger["warning"]
    rolled = village.client.post("/personas/stranger/rollback", json={"version": 1}).json()
    assert rolled["flagged"]


def test_a_mask_is_not_installed_under_a_running_sculpt(village: RunningServer) -> None:
    create(village)
    content = encode(mask_file(village.base, "Mira", MIRA["text"], 1))
    response = village.client.put("/personas/mira/mask", content=content)
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "job_conflict"


def test_reports_and_examples_of_every_version(village: RunningServer) -> None:
    for seed in (1, 2):
        add_version(village, "mira", "Mira", MIRA["text"], seed)
    assert village.client.get("/personas/mira/report").json()["seed"] == 2
    assert village.client.get("/personas/mira/report?version=1").json()["seed"] == 1
    (example,) = village.client.get("/personas/mira/examples").json()["data"]
    assert example == {"question": "Tea?", "answer": "Aye.", "sensitivity": 0.5}
    assert village.client.get("/personas/mira/examples?offset=1").json() == {"data": []}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_mask_file_is_said_and_the_base_answers(village: RunningServer, damage: str) -> None:
    for seed in (1, 2):
        add_version(village, "mira", "Mira", MIRA["text"], seed)
    path = village.state.files.mask_path("mira", 2)
    whole = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "truncate":
            path.write_bytes(whole[:50])
        case "remove":
            path.unlink()
        case "swap":
            path.write_bytes(village.state.files.mask_path("mira", 1).read_bytes())
    village.state.ready().catalogue._functions.clear()  # as after a restart
    assert village.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("base-")
    persona = get(village, "mira")
    assert persona["serving"] == "base"
    assert "cannot be served" in persona["warning"]
    download = village.client.get("/personas/mira/mask")
    assert download.status_code == 500
    assert download.json()["error"]["code"] == "damaged_file"
    assert village.chat("mira@1", max_tokens=1).json()["system_fingerprint"].startswith("v1-")


def test_a_full_disk_while_a_mask_is_installed_changes_nothing(
    village: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sculpted(village)
    content = encode(mask_file(village.base, "Mira", MIRA["text"], 7))

    def full(*args: Any, **kwargs: Any) -> None:
        raise StorageFull(village.state.settings.data_dir, 100)

    monkeypatch.setattr(type(village.state.files), "publish_version", full)
    response = village.client.put("/personas/mira/mask", content=content)
    assert response.status_code == 507
    error = response.json()["error"]
    assert error["code"] == "storage_full"
    assert "disk is full" in error["message"]
    assert get(village, "mira")["version"] == 1
    assert village.chat("mira", max_tokens=1).status_code == 200


def test_overlap(village: RunningServer) -> None:
    for number in range(3):
        add_version(village, f"p{number}", f"P{number}", "Anyone.", number)
    create(village, name="Maskless", sculpt=False)
    found = village.client.get("/casts/default/overlap").json()
    assert found["personas"] == ["p0", "p1", "p2"]
    assert [(one["a"], one["b"]) for one in found["pairs"]] == [("p0", "p1"), ("p0", "p2"), ("p1", "p2")]
    for pair in found["pairs"]:
        assert pair["chance"] == pytest.approx(1 / 3)  # two random halves
        assert pair["jaccard"] == pytest.approx(1 / 3, abs=0.1)
    assert 48 < found["union"]["neurons_per_layer"] <= 96
    village.chat("p2", max_tokens=1)
    assert village.client.get("/casts/default/overlap?n=2").json()["personas"] == ["p2", "p0"]
    assert village.client.get("/casts/elsewhere/overlap").json() == {
        "cast": "elsewhere",
        "personas": [],
        "pairs": [],
        "union": None,
    }


# --- events


def test_events_replay_and_follow_to_the_end(village: RunningServer) -> None:
    create(village)
    heard: list[httpx.Response] = []
    headers = {"accept": "text/event-stream"}
    watching = threading.Thread(
        target=lambda: heard.append(httpx.get(f"{village.url}/personas/mira/events", headers=headers, timeout=30))
    )
    watching.start()
    job = claim(village)
    village.state.registry.report_progress(job.id, "learn", 3, 10, 12.5, {"loss": 1.5, "message": "m"})
    finish(village, job)
    watching.join()
    events = stream_events(heard[0])
    assert [one["event"] for one in events] == [
        "created",
        "queued",
        "started",
        "stage",
        "published",
        "succeeded",
    ]
    progress = json.loads(events[3]["data"])
    assert (progress["stage"], progress["completed"], progress["total"]) == ("learn", 3, 10)
    assert (progress["eta_s"], progress["loss"], progress["job_id"]) == (12.5, 1.5, job.id)
    assert json.loads(events[4]["data"])["version"] == 1
    assert all(json.loads(one["data"])["id"] == int(one["id"]) for one in events)


def test_events_resume_after_the_last_one_seen(village: RunningServer) -> None:
    sculpted(village)
    headers = {"accept": "text/event-stream"}
    every = stream_events(village.client.get("/personas/mira/events", headers=headers))
    for index, one in enumerate(every):
        resumed = village.client.get("/personas/mira/events", headers=headers | {"last-event-id": one["id"]})
        assert stream_events(resumed) == every[index + 1 :]


def test_events_as_json(village: RunningServer) -> None:
    sculpted(village)
    found = village.client.get("/personas/mira/events").json()["data"]
    assert [one["type"] for one in found] == ["created", "queued", "started", "published", "succeeded"]
    later = village.client.get("/personas/mira/events", headers={"last-event-id": str(found[2]["id"])})
    assert later.json()["data"] == found[3:]


def test_a_watcher_that_leaves_stops_nothing(village: RunningServer) -> None:
    create(village)
    job = claim(village)
    with village.client.stream("GET", "/personas/mira/events", headers={"accept": "text/event-stream"}):
        pass
    assert village.state.registry.get_job(job.id).status == "running"
    finish(village, job)


def test_a_failing_registry_is_polled_again(village: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = village.state.registry
    real, failures = registry.changes_after, [0]

    def failing(seq: int, limit: int) -> Any:
        if not failures[0]:
            failures[0] += 1
            raise MasqueradeError("busy")
        return real(seq, limit)

    monkeypatch.setattr(registry, "changes_after", failing)
    wait_until(lambda: failures[0], "the failure")
    digest = add_version(village, "mira", "Mira", MIRA["text"], 1)
    wait_until(lambda: village.state.ready().engine.residency(digest) != "none", "the publish to be seen")


def known(village: RunningServer) -> list[dict[str, Any]]:
    """All personas, without what depends on the moment."""
    return [one | {"residency": None} for one in village.client.get("/personas").json()["data"]]


def test_a_restart_forgets_nothing(start_server: Starter, settings: Settings) -> None:
    first = start_server(settings)
    sculpted(first)
    create(first, name="Waiting")
    before = known(first)
    first.stop()
    second = start_server(settings)
    assert known(second) == before
    assert second.chat("mira", max_tokens=1).json()["system_fingerprint"].startswith("v1-")
    assert claim(second).persona_id == "waiting"


# --- who teaches


def test_a_configured_teacher_may_be_chosen_and_is_told_to_nobody(start_server: Starter, settings: Settings) -> None:
    taught = replace(
        settings, teacher_url="http://127.0.0.1:9/v1", teacher_model="scribe", teacher_api_key="sk-never-0451"
    )
    running = start_server(taught)
    create(running, teacher="remote")
    job = claim(running)
    assert job.spec["teacher"] == "remote"
    told = [running.client.get(path).text for path in ("/personas/mira", "/personas/mira/events", "/openapi.json")]
    assert not any("sk-never" in one or "127.0.0.1:9" in one for one in (*told, str(job)))


def test_a_teacher_that_is_gone_is_refused_when_a_sculpt_needs_it(start_server: Starter, settings: Settings) -> None:
    taught = start_server(replace(settings, teacher_url="http://127.0.0.1:9/v1", teacher_model="scribe"))
    create(taught, teacher="remote", sculpt=False)
    taught.stop()
    running = start_server(settings)
    for patch in ({"text": "Mira moved."}, {"teacher": "remote", "sculpt": False}):
        refused = running.client.patch("/personas/mira", json=patch)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "teacher")
    assert running.client.patch("/personas/mira", json={"name": "Mira B.", "sculpt": False}).status_code == 200
    assert running.client.patch("/personas/mira", json={"text": "Mira moved.", "teacher": "base"}).status_code == 202
