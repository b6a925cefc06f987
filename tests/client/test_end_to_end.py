"""Both clients against a real server on a loopback port, over a tiny base. The test is the sculpt worker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from masquerade_client import (
    AsyncMasquerade,
    AuthenticationError,
    BadRequest,
    Conflict,
    Masquerade,
    MasqueradeError,
    NotFound,
    SculptCancelled,
    SculptFailed,
    ServerError,
)
from masquerade_engine.prompt import prompt_sha256
from masquerade_masks import FFNShape, Mask, SubNetwork
from masquerade_masks.mask_file import MaskFile, MaskHeader
from masquerade_masks.registry import Job, SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server.app import REGISTRY_FILE, create_app
from masquerade_server.publishing import Publication, publish
from masquerade_server.serve import ClosingServer, bind
from masquerade_server.settings import Settings

TEXT = "Mira keeps a lighthouse and distrusts the sea."
SHAPE = FFNShape(num_layers=3, intermediate_size=96, hidden_size=32)


@dataclass
class Town:
    """A server that can be stopped and started again on the same port and data."""

    settings: Settings
    port: int = 0
    _server: ClosingServer | None = None
    _thread: threading.Thread | None = None
    _workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def start(self) -> None:
        bound = bind("127.0.0.1", self.port)
        self.port = bound.getsockname()[1]
        app: FastAPI = create_app(self.settings)
        self._server = ClosingServer(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5), app)
        self._thread = threading.Thread(target=self._server.run, args=([bound],))
        self._thread.start()

    def stop(self) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self._workers.shutdown()
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def as_worker(self, work: Callable[[SQLiteRegistry, Job], Any]) -> Any:
        """A future of `work` on the next job, done by a worker in a thread of its own."""
        return self._workers.submit(self._claim_and, work)

    def _claim_and(self, work: Callable[[SQLiteRegistry, Job], Any]) -> None:
        with SQLiteRegistry(self.settings.data_dir / REGISTRY_FILE) as registry:
            deadline = time.monotonic() + 20
            while (job := registry.claim_job("worker", 60.0)) is None:
                assert time.monotonic() < deadline, "no job came"
                time.sleep(0.02)
            work(registry, job)

    def publish(self, registry: SQLiteRegistry, job: Job) -> None:
        """What a sculpt ends with: a random mask for the job's persona."""
        persona = registry.get_persona(job.persona_id)
        dense = np.zeros((SHAPE.num_layers, SHAPE.intermediate_size), dtype=bool)
        generator = np.random.default_rng(job.spec["seed"])
        for layer in dense:
            layer[generator.permutation(SHAPE.intermediate_size)[:64]] = True
        content = MaskFile(
            SubNetwork(base=persona.base, shape=SHAPE, mask=Mask.from_dense(dense)),
            MaskHeader(
                persona=persona.id,
                version=0,
                recovery="none",
                prompt_sha256=prompt_sha256(persona.system_prompt),
                settings={},
            ),
        )
        files = PersonaFiles(self.settings.data_dir)
        report = {"format": "masquerade.report/1", "kept": 64}
        examples = b'{"question": "Tea?", "answer": "Aye.", "sensitivity": 0.5, "topic": "food"}\n'
        text, prompt = job.spec["text"], persona.system_prompt
        publication = Publication(persona.id, text, prompt, content, "sculpt", report, examples)
        publish(registry, files, publication, job_id=job.id, worker="worker")


@pytest.fixture(scope="module")
def town(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    data_dir = tmp_path_factory.mktemp("town")
    settings = Settings(
        data_dir=data_dir,
        cache_dir=data_dir / "cache",
        model=str(tiny_base_dir),
        dtype="fp32",
        max_num_seqs=4,
        workers=0,
    )
    town = Town(settings)
    town.start()
    try:
        wait_until_ready(town)
        yield town
    finally:
        town.close()


def wait_until_ready(town: Town) -> None:
    with Masquerade(town.url, max_retries=20) as client:
        assert client.server.ready().dtype == "float32"


@pytest.fixture
def client(town: Town) -> Iterator[Masquerade]:
    with Masquerade(town.url) as client:
        yield client


def learn(town: Town) -> Callable[[SQLiteRegistry, Job], None]:
    def work(registry: SQLiteRegistry, job: Job) -> None:
        registry.report_progress(job.id, "learn", 1, 2, 3.5, {"loss": 0.5, "message": "learning the mask"})
        town.publish(registry, job)

    return work


def test_sculpt_and_chat(town: Town, client: Masquerade) -> None:
    working = town.as_worker(learn(town))
    sculpt = client.personas.sculpt(name="Mira", text=TEXT, id="mira", sparsity=0.3, preset="smoke", seed=1)
    events = list(sculpt)
    working.result()
    step = next(one for one in events if one.stage == "learn")
    assert (step.completed, step.total, step.eta_s, step.loss) == (1, 2, 3.5, 0.5)
    assert [one.type for one in events][-2:] == ["published", "succeeded"]

    persona = sculpt.result()
    assert (persona.id, persona.serving, persona.version, persona.sparsity) == ("mira", "mask", 1, 0.3)
    assert persona.mask is not None
    assert (persona.mask.kept, persona.mask.intermediate_size) == (64, 96)
    assert persona.job is not None
    assert persona.job.status == "succeeded"
    assert TEXT in (persona.system_prompt or "")

    whole = client.chat.complete("mira", "Hello?", max_tokens=6, temperature=0, ignore_eos=True)
    assert whole.usage is not None
    assert (whole.finish_reason, whole.usage.completion_tokens) == ("length", 6)
    stream = client.chat.stream("mira", "Hello?", max_tokens=6, temperature=0, ignore_eos=True)
    text = "".join(chunk.text for chunk in stream)
    streamed = stream.result()
    assert (streamed.text, streamed.finish_reason) == (text, "length") == (whole.text, "length")
    assert streamed.usage is not None
    assert streamed.usage.completion_tokens == 6
    assert streamed.system_fingerprint == whole.system_fingerprint
    assert client.chat.complete("mira@dense", "Hello?", max_tokens=2).model == "mira@dense"


def test_everything_about_a_persona(town: Town, client: Masquerade) -> None:
    working = town.as_worker(learn(town))
    persona = client.personas.create(name="Odo", text=TEXT, cast="isle", seed=2, wait=True)
    working.result()
    assert persona.id == "odo"
    report = client.personas.report("odo")
    assert report is not None
    assert report.kept == 64
    (example,) = client.personas.examples("odo")
    assert (example.question, example.answer, example.topic) == ("Tea?", "Aye.", "food")
    assert [one.type for one in client.personas.events("odo")][-1] == "succeeded"
    assert [one.id for one in client.personas.list(cast="isle")] == ["odo"]
    assert {"mira", "odo"} & {one.id for one in client.models.list()}
    assert client.models.get("odo@dense").id == "odo@dense"
    assert client.casts.overlap("isle").personas == ("odo",)
    (warm,) = client.personas.warm(["odo"])
    assert (warm.id, warm.version) == ("odo", 1)
    assert warm.prompt_tokens > len(TEXT)  # a token is a byte
    reply = client.chat.complete("odo", "Hm?", n=2, seed=1, max_tokens=4, ignore_eos=True)
    assert [choice.index for choice in reply.choices] == [0, 1]

    mask = client.personas.download_mask("odo")
    assert client.personas.upload_mask("odo", mask).version == 2
    with pytest.raises(NotFound, match="no attached weights"):
        client.personas.download_attached("odo")
    assert client.personas.report("odo") is None
    assert client.personas.rollback("odo").version == 1
    kept = client.personas.update("odo", text=TEXT + " He is old.", sculpt=False)
    assert (kept.version, kept.flagged) == (1, True)
    client.personas.delete("odo")
    with pytest.raises(NotFound, match="odo"):
        client.personas.get("odo")
    with pytest.raises(NotFound, match="odo"):
        client.chat.complete("odo", "Hello?")


def test_a_retried_creation_creates_nothing_twice(client: Masquerade) -> None:
    first = client.personas.create(name="Twin", text=TEXT, idempotency_key="k-1")
    again = client.personas.create(name="Twin", text=TEXT, idempotency_key="k-1")
    other = client.personas.create(name="Twin", text=TEXT)
    assert (first.id, again.id, other.id) == ("twin", "twin", "twin-2")
    assert first.job is not None
    assert again.job is not None
    assert first.job.id == again.job.id
    for persona_id in ("twin", "twin-2"):
        assert client.personas.cancel(persona_id).status == "cancelled"


def test_a_failed_and_a_cancelled_sculpt(town: Town, client: Masquerade) -> None:
    working = town.as_worker(lambda registry, job: registry.finish_job(job.id, "failed", "no space left"))
    with pytest.raises(SculptFailed, match="no space left"):
        client.personas.create(name="Unlucky", text=TEXT, wait=True)
    working.result()

    sculpt = client.personas.sculpt(name="Unwanted", text=TEXT)
    assert next(sculpt).type == "queued"
    client.personas.cancel("unwanted")
    with pytest.raises(SculptCancelled):
        sculpt.result()


@pytest.mark.parametrize(
    ("call", "error", "param"),
    [
        (lambda c: c.personas.create(name="X", text="  "), BadRequest, "text"),
        (lambda c: c.personas.create(name="X", text="y", sparsity=1.0), BadRequest, "sparsity"),
        (lambda c: c.personas.create(name="X", text="y", preset="tiny"), BadRequest, "preset"),
        (lambda c: c.chat.complete("nobody", "Hello?"), NotFound, "model"),
        (lambda c: c.chat.complete("mira", "x" * 5000), BadRequest, "messages"),
        (lambda c: c.chat.stream("mira", "Hi", max_tokens=0).result(), BadRequest, "max_tokens"),
        (lambda c: c.personas.upload_mask("mira", b"not a mask"), BadRequest, "mask"),
        (lambda c: c.personas.report("mira", version=9), NotFound, "version"),
        (lambda c: c.personas.warm(["mira", "nobody"]), NotFound, "ids[1]"),
        (lambda c: c.personas.create(name="Mira", text="y", id="mira"), Conflict, "id"),
        (lambda c: c.personas.cancel("mira"), Conflict, None),
    ],
)
def test_refusals(
    town: Town, call: Callable[[Masquerade], Any], error: type[MasqueradeError], param: str | None
) -> None:
    with Masquerade(town.url) as client:
        if "mira" not in {one.id for one in client.personas.list()}:
            client.personas.create(name="Mira", text=TEXT, sculpt=False)
        with pytest.raises(error) as caught:
            call(client)
    assert type(caught.value) is error
    assert getattr(caught.value, "param", None) == param
    assert getattr(caught.value, "request_id", None)


async def test_asynchronously(town: Town) -> None:
    working = town.as_worker(learn(town))
    async with AsyncMasquerade(town.url) as client:
        sculpt = client.personas.sculpt(name="Ada", text=TEXT, seed=3)
        stages = [event.stage async for event in sculpt if event.stage]
        assert stages == ["learn"]
        assert (await sculpt.result()).serving == "mask"
        await asyncio.wrap_future(working)

        async def reply(persona: str) -> str:
            async with client.chat.stream(persona, "Hello?", max_tokens=8, temperature=0, ignore_eos=True) as stream:
                return "".join([chunk.text async for chunk in stream])

        together = await asyncio.gather(*(reply(name) for name in ("ada", "ada@dense", "ada", "ada@1")))
        assert together[0] == together[2] == together[3]

        async with client.chat.stream("ada", "Hello?", max_tokens=300, ignore_eos=True) as left:
            async for _ in left:
                break
        assert (await client.chat.complete("ada", "Still there?", max_tokens=2)).usage is not None


def test_a_key_is_asked_for(tiny_base_dir: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, cache_dir=tmp_path, model=str(tiny_base_dir), workers=0, api_key="k")
    town = Town(settings)
    town.start()
    try:
        with Masquerade(town.url) as client, pytest.raises(AuthenticationError, match="API key"):
            client.models.list()
        with Masquerade(town.url, api_key="k", max_retries=20) as client:
            assert client.models.list()
    finally:
        town.close()


def test_a_watcher_outlives_a_restart_of_the_server(town: Town) -> None:
    resume = threading.Event()

    def work(registry: SQLiteRegistry, job: Job) -> None:
        registry.report_progress(job.id, "answer", 1, 9, None, {})
        assert resume.wait(30)
        registry.report_progress(job.id, "learn", 1, 9, None, {})
        town.publish(registry, job)

    working = town.as_worker(work)
    with Masquerade(town.url, max_retries=0) as client:
        sculpt = client.personas.sculpt(name="Steady", text=TEXT)
        seen = []
        for event in sculpt:
            seen.append(event)
            if event.stage == "answer":
                town.stop()
                with pytest.raises((MasqueradeError, ServerError)):
                    client.models.list()
                town.start()
                resume.set()
        working.result()
        assert sculpt.result().version == 1
    ids = [event.id for event in seen]
    assert ids == sorted(set(ids))
    assert [event.stage for event in seen if event.stage] == ["answer", "learn"]
    wait_until_ready(town)
