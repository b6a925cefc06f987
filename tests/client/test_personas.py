"""The persona calls, and above all: following a sculpt over connections that break."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade_client import (
    APIConnectionError,
    Conflict,
    Estimate,
    Example,
    InvalidResponse,
    MaskInfo,
    NotFound,
    Overlap,
    Readiness,
    SculptCancelled,
    SculptFailed,
    Version,
    WarmPersona,
)

MASK = {"digest": "d1", "bytes": 5800, "kept": 1152, "intermediate_size": 1536}
VERSION = {"number": 1, "text": "A keeper.", "sparsity": 0.25, "recovery": "none", "source": "sculpt"} | MASK
PERSONA: dict[str, Any] = {
    "id": "mira",
    "name": "Mira",
    "text": "A keeper.",
    "system_prompt": "You are Mira.",
    "cast": "default",
    "serving": "base",
    "version": None,
    "versions": [],
    "job": None,
    "sparsity": 0.25,
    "recovery": "none",
    "mask": None,
    "residency": "dense",
    "flagged": False,
    "warning": None,
    "report": None,
    "created": "2026-11-21T10:00:00.000Z",
    "updated": "2026-11-21T10:00:00.000Z",
    "a_field_of_tomorrow": [1, 2],
}
SERVED = PERSONA | {"serving": "mask", "version": 1, "versions": [VERSION], "mask": MASK}


def job(status: str, id: str = "job-1", error: str | None = None) -> dict[str, Any]:
    return {
        "id": id,
        "status": status,
        "stage": None,
        "completed": 0,
        "total": 0,
        "eta_s": None,
        "error": error,
    }


def event(seq: int, kind: str, job_id: str | None = "job-1", **data: Any) -> bytes:
    payload = json.dumps({**data, "id": seq, "type": kind, "job_id": job_id, "created": "now"})
    return f"id: {seq}\nevent: {kind}\ndata: {payload}\n\n".encode()


class Town:
    """A server of one persona: `streams` are the answers to its event stream, one a connection."""

    def __init__(self, pieces: Any, *streams: Any, final: dict[str, Any] | None = None) -> None:
        self.pieces = pieces
        self.streams = list(streams)
        self.final = SERVED | {"job": job("succeeded")} if final is None else final
        self.resumed_after: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            self.resumed_after.append(request.headers.get("last-event-id"))
            assert request.headers["accept"] == "text/event-stream"
            stream = self.streams.pop(0)
            if isinstance(stream, httpx.Response):
                return stream
            return httpx.Response(200, stream=self.pieces(*stream))
        running = PERSONA | {"job": job("running")}
        if request.method == "POST":
            return httpx.Response(202, json={"persona": PERSONA, "job": job("queued"), "urls": {}})
        return httpx.Response(200, json=running if self.streams else self.final)


def sculpt(client: Any, seen: list[Any]) -> Any:
    return client.iterate(lambda c: c.personas.sculpt(name="Mira", text="A keeper.", preset="smoke"), seen)


def test_a_sculpt_from_creation_to_the_finished_persona(client_of: Any, pieces: Any) -> None:
    town = Town(
        pieces,
        [
            event(1, "created", None),
            event(2, "queued"),
            b": still here\n\n",
            event(3, "progress", stage="learn", completed=5, total=60, eta_s=81, loss=0.52, message="learning"),
            event(4, "published", version=1),
            event(5, "succeeded"),
        ],
    )
    client, seen = client_of(town), list[Any]()
    persona = sculpt(client, seen)
    assert [one.type for one in seen] == ["queued", "progress", "published", "succeeded"]
    step = seen[1]
    assert (step.id, step.stage, step.completed, step.total, step.eta_s) == (3, "learn", 5, 60, 81.0)
    assert (step.loss, step.message, step.data["loss"]) == (0.52, "learning", 0.52)
    assert (persona.serving, persona.version, persona.job.status) == ("mask", 1, "succeeded")
    assert persona.mask == MaskInfo("d1", 5800, 1152, 1536)
    assert persona.mask.sparsity == 0.25
    assert persona.versions == (Version(1, "d1", 0.25, "none", 1152, 1536, 5800, "sculpt", "A keeper."),)
    body = json.loads(client.requests[0].content)
    assert body == {"name": "Mira", "text": "A keeper.", "preset": "smoke"}


@pytest.mark.parametrize(
    "broken",
    [
        [event(2, "queued"), httpx.ReadError("reset")],
        [event(2, "queued"), httpx.ReadTimeout("silence")],
        [event(2, "queued")],  # closed politely before the end
        [event(2, "queued"), b"id: 3\nevent: stage\ndata: {"],  # cut inside an event
    ],
)
def test_a_broken_connection_is_resumed_after_the_last_event(client_of: Any, pieces: Any, broken: Any) -> None:
    rest = [event(3, "stage", stage="learn"), event(4, "succeeded")]
    town = Town(pieces, broken, rest)
    client, seen = client_of(town), list[Any]()
    assert sculpt(client, seen).version == 1
    assert [one.id for one in seen] == [2, 3, 4]
    assert town.resumed_after == [None, "2"]
    assert len(client.pauses) == 1


def test_a_server_that_restarts_is_waited_for(client_of: Any, pieces: Any) -> None:
    loading = httpx.Response(503, json={"error": {"message": "loading"}}, headers={"retry-after": "2"})
    town = Town(pieces, [event(2, "queued")], *[_copy(loading) for _ in range(4)], [event(3, "succeeded")])
    client, seen = client_of(town), list[Any]()
    assert sculpt(client, seen).version == 1
    assert [one.id for one in seen] == [2, 3]
    assert client.pauses.count(2.0) >= 3


def _copy(response: httpx.Response) -> httpx.Response:
    return httpx.Response(response.status_code, content=response.content, headers=response.headers)


def test_a_watcher_does_not_wait_forever(client_of: Any, pieces: Any) -> None:
    gone = httpx.ReadError("reset")
    town = Town(pieces, [event(2, "queued"), gone], *[[gone] for _ in range(50)])
    client, seen = client_of(town), list[Any]()
    with pytest.raises(APIConnectionError):
        sculpt(client, seen)
    assert [one.id for one in seen] == [2]
    assert 30 < sum(client.pauses) < 60


def test_the_ending_is_kept_when_the_connection_breaks_right_after_it(client_of: Any, pieces: Any) -> None:
    town = Town(pieces, [event(2, "succeeded")])
    lost = [httpx.ReadError("reset")] * 3  # one request and its two retries

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and request.url.path == "/personas/mira" and lost:
            raise lost.pop()
        return town(request)

    assert sculpt(client_of(handle), []).version == 1


def test_the_events_of_other_jobs_are_left_out(client_of: Any, pieces: Any) -> None:
    earlier = [event(1, "queued", "job-0"), event(2, "failed", "job-0", error="old")]
    town = Town(pieces, [*earlier, event(3, "queued"), event(4, "succeeded")])
    seen: list[Any] = []
    sculpt(client_of(town), seen)
    assert [one.id for one in seen] == [3, 4]


def test_a_failed_sculpt(client_of: Any, pieces: Any) -> None:
    final = PERSONA | {"job": job("failed", error="no space left")}
    town = Town(pieces, [event(2, "queued"), event(3, "failed", error="no space left")], final=final)
    seen: list[Any] = []
    with pytest.raises(SculptFailed, match="'mira' failed: no space left") as caught:
        sculpt(client_of(town), seen)
    assert (caught.value.persona_id, caught.value.reason) == ("mira", "no space left")
    assert seen[-1].type == "failed"


def test_a_cancelled_sculpt(client_of: Any, pieces: Any) -> None:
    town = Town(pieces, [event(2, "cancelled")], final=PERSONA | {"job": job("cancelled")})
    with pytest.raises(SculptCancelled) as caught:
        sculpt(client_of(town), [])
    assert caught.value.persona_id == "mira"


def test_a_job_that_ended_while_nobody_was_connected(client_of: Any, pieces: Any) -> None:
    town = Town(pieces, [], final=PERSONA | {"job": job("failed", error="killed")})
    with pytest.raises(SculptFailed, match="killed"):
        sculpt(client_of(town), [])


def test_create_and_wait(client_of: Any, pieces: Any) -> None:
    broken = [event(2, "queued"), httpx.ReadError("reset")]
    client = client_of(Town(pieces, broken, [event(3, "succeeded")]))
    persona = client.call(lambda c: c.personas.create(name="Mira", text="A keeper.", wait=True))
    assert persona.serving == "mask"


def test_create_returns_at_once_with_the_job(client_of: Any, pieces: Any) -> None:
    client = client_of(Town(pieces))
    persona = client.call(
        lambda c: c.personas.create(name="Mira", text="A keeper.", id="mira", cast="isle", idempotency_key="k")
    )
    assert (persona.serving, persona.job.status) == ("base", "queued")
    (request,) = client.requests
    assert request.headers["idempotency-key"] == "k"
    sent = {"name": "Mira", "text": "A keeper.", "id": "mira", "cast": "isle", "sculpt": True}
    assert json.loads(request.content) == sent


def test_watching_a_persona_that_is_not_being_sculpted(client_of: Any, pieces: Any) -> None:
    client, seen = client_of(Town(pieces)), list[Any]()
    assert client.iterate(lambda c: c.personas.watch("mira"), seen).version == 1
    assert seen == []


def test_watching_from_a_known_event(client_of: Any, pieces: Any) -> None:
    town = Town(pieces, [event(8, "succeeded")])
    seen: list[Any] = []
    client_of(town).iterate(lambda c: c.personas.watch("mira", after=7), seen)
    assert [one.id for one in seen] == [8]
    assert town.resumed_after == ["7"]


@pytest.mark.parametrize("data", [b"not json", b"[]", b'{"type": "stage"}', b'{"id": "x", "type": "stage"}'])
def test_events_of_something_else(client_of: Any, pieces: Any, data: bytes) -> None:
    with pytest.raises(InvalidResponse):
        sculpt(client_of(Town(pieces, [b"data: " + data + b"\n\n"])), [])


def test_list_pages_as_it_goes(client_of: Any) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params.get("after", 0))
        page = [PERSONA | {"id": f"p-{number}"} for number in range(start, min(start + 2, 5))]
        return httpx.Response(200, json={"data": page, "next": str(start + 2) if start + 2 < 5 else None})

    client, seen = client_of(handle), list[Any]()
    client.iterate(lambda c: c.personas.list(cast="isle", page_size=2), seen)
    assert [one.id for one in seen] == [f"p-{number}" for number in range(5)]
    assert [dict(one.url.params).get("after") for one in client.requests] == [None, "2", "4"]
    assert all(one.url.params["cast"] == "isle" for one in client.requests)
    seen.clear()
    client.requests.clear()
    client.iterate(lambda c: c.personas.list(page_size=2), seen, limit=1)
    assert len(client.requests) == 1


def answering(payload: Any, status: int = 200) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, json=payload)


def test_update(client_of: Any) -> None:
    client = client_of(answering({"persona": PERSONA, "job": job("queued", "job-2"), "urls": {}}, 202))
    persona = client.call(lambda c: c.personas.update("mira", text="Older.", sparsity=0.5))
    assert persona.job.id == "job-2"
    assert client.requests[0].method == "PATCH"
    assert json.loads(client.requests[0].content) == {"text": "Older.", "sparsity": 0.5}
    client.call(lambda c: c.personas.update("mira", text="Older.", sculpt=False))
    assert json.loads(client.requests[1].content) == {"text": "Older.", "sculpt": False}


def test_update_and_wait_without_a_job_returns_at_once(client_of: Any) -> None:
    answer = {"persona": SERVED | {"job": job("failed", error="an old one")}, "job": None, "urls": {}}
    client = client_of(answering(answer))
    assert client.call(lambda c: c.personas.update("mira", name="Mira", wait=True)).version == 1


def test_rollback(client_of: Any) -> None:
    client = client_of(answering(SERVED))
    assert client.call(lambda c: c.personas.rollback("mira", 1)).version == 1
    client.call(lambda c: c.personas.rollback("mira"))
    assert [json.loads(one.content) for one in client.requests] == [{"version": 1}, {}]
    assert client.requests[0].url.path == "/personas/mira/rollback"


def test_cancel(client_of: Any) -> None:
    client = client_of(answering({"job": job("cancelled")}))
    cancelled = client.call(lambda c: c.personas.cancel("mira"))
    assert (cancelled.status, cancelled.ended) == ("cancelled", True)
    idle = client_of(answering({"error": {"message": "not being sculpted", "code": "job_conflict"}}, 409))
    with pytest.raises(Conflict, match="not being sculpted"):
        idle.call(lambda c: c.personas.cancel("mira"))


def test_warm(client_of: Any) -> None:
    ready = {"id": "mira", "version": 1, "prompt_tokens": 170, "cached_tokens": 160, "residency": "compact"}
    plain = ready | {"id": "plain", "version": None, "cached_tokens": 0, "residency": "dense"}
    client = client_of(answering({"object": "list", "data": [ready, plain]}))
    found = client.call(lambda c: c.personas.warm(["mira", "plain"], pin=True))
    assert found == [WarmPersona("mira", 1, 170, 160, "compact"), WarmPersona("plain", None, 170, 0, "dense")]
    (request,) = client.requests
    assert (request.method, request.url.path) == ("POST", "/personas/warm")
    assert json.loads(request.content) == {"ids": ["mira", "plain"], "pin": True}
    gone = client_of(answering({"error": {"message": "no persona 'x'", "param": "ids[1]"}}, 404))
    with pytest.raises(NotFound, match="'x'") as caught:
        gone.call(lambda c: c.personas.warm(("mira", "x")))
    assert caught.value.param == "ids[1]"


def test_one_id_is_no_list_of_ids(client_of: Any) -> None:
    with pytest.raises(TypeError, match="a list of persona ids"):
        client_of(answering({})).call(lambda c: c.personas.warm("mira"))


def test_delete(client_of: Any) -> None:
    client = client_of(answering({"id": "mira", "deleted": True}))
    assert client.call(lambda c: c.personas.delete("mira")) is None
    gone = client_of(answering({"error": {"message": "no persona"}}, 404))
    with pytest.raises(NotFound):
        gone.call(lambda c: c.personas.delete("mira"))


def test_events_as_a_list(client_of: Any) -> None:
    data = [{"id": 1, "type": "created", "job_id": None, "created": "now"}]
    client = client_of(answering({"data": data}))
    (found,) = client.call(lambda c: c.personas.events("mira", after=0))
    assert (found.id, found.type, found.data) == (1, "created", data[0])
    assert client.requests[0].headers["accept"] == "application/json"
    assert client.requests[0].headers["last-event-id"] == "0"


def test_masks(client_of: Any, tmp_path: Path) -> None:
    content = bytes(range(256))
    client = client_of(lambda _: httpx.Response(200, content=content))
    assert client.call(lambda c: c.personas.download_mask("mira", version=2)) == content
    assert client.requests[0].url.params["version"] == "2"
    assert client.call(lambda c: c.personas.download_attached("mira", version=3)) == content
    assert client.requests[1].url.path.endswith("/personas/mira/attached")
    assert client.requests[1].url.params["version"] == "3"

    (tmp_path / "mask.safetensors").write_bytes(content)
    upload = client_of(answering(SERVED))
    for mask in (content, tmp_path / "mask.safetensors"):
        assert upload.call(lambda c, mask=mask: c.personas.upload_mask("mira", mask)).version == 1
    assert [one.content for one in upload.requests] == [content, content]
    assert upload.requests[0].method == "PUT"


def test_report(client_of: Any) -> None:
    def uploaded(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b"null")

    payload = {
        "format": "masquerade.report/1",
        "kept": 1152,
        "one_turn": {"all": {"kl": {"mean": 0.4}}},
        "new": 1,
    }
    found = client_of(answering(payload)).call(lambda c: c.personas.report("mira"))
    assert (found.kept, found.one_turn["all"]["kl"]["mean"], found.data) == (1152, 0.4, payload)
    assert client_of(uploaded).call(lambda c: c.personas.report("mira")) is None


def test_examples(client_of: Any) -> None:
    row = {"question": "Tea?", "answer": "Aye.", "sensitivity": 0.2, "topic": "food", "num_earlier_turns": 0}
    found = client_of(answering({"data": [row]})).call(lambda c: c.personas.examples("mira", version=1))
    assert found == [Example("Tea?", "Aye.", 0.2, "food")]


def test_estimate_creates_nothing(client_of: Any) -> None:
    payload = {"seconds": 600, "queue_position": 2, "stages": {"learn": 400}}
    client = client_of(answering(payload))
    found = client.call(lambda c: c.personas.estimate(name="Mira", text="A keeper.", preset="thorough"))
    assert isinstance(found, Estimate)
    assert (found.seconds, found.queue_position, found.data["stages"]) == (600.0, 2, {"learn": 400})
    body = json.loads(client.requests[0].content)
    assert (body["dry_run"], body["preset"]) == (True, "thorough")
    assert "idempotency-key" not in client.requests[0].headers


def test_overlap_and_readiness(client_of: Any) -> None:
    pair = {"a": "x", "b": "y", "jaccard": 0.8, "chance": 0.6}
    payload = {"cast": "isle", "personas": ["x", "y"], "pairs": [pair], "union": None}
    found = client_of(answering(payload)).call(lambda c: c.casts.overlap("isle", n=2))
    assert isinstance(found, Overlap)
    assert (found.personas, found.pairs[0].jaccard, found.union) == (("x", "y"), 0.8, None)
    ready = client_of(answering({"status": "ready", "model": "smollm2"})).call(lambda c: c.server.ready())
    assert ready == Readiness("ready", "smollm2")


@pytest.mark.parametrize(
    "payload",
    [
        [],
        "x",
        {},
        PERSONA | {"id": 3},
        PERSONA | {"versions": {}},
        PERSONA | {"job": {}},
        PERSONA | {"name": None},
    ],
)
def test_a_persona_that_is_none(client_of: Any, payload: Any) -> None:
    with pytest.raises(InvalidResponse, match=r"persona|id|versions|job|name"):
        client_of(answering(payload)).call(lambda c: c.personas.get("mira"))
