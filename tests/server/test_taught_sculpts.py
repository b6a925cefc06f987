"""Sculpts with a remote teacher, end to end: the API, a worker process with the real pruner, and a teacher's server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from running_server import RunningServer, Starter, settings_for, wait_until
from scripted_teacher import ScriptedTeacher, agreeable, fails, says, scripted_teachers
from starlette.responses import Response

from masquerade_masks.mask_file import decode

WORKER = Path(__file__).parent / "small_pruner_worker.py"
KEY = "sk-never-to-be-seen-0451"
WITCH = {
    "name": "Nettie",
    "text": "A swamp witch who cackles.",
    "preset": "smoke",
    "sparsity": 0.5,
    "teacher": "remote",
}
FINAL = ("succeeded", "failed", "cancelled")
Smithy = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def roomy_base_dir(tmp_path_factory: pytest.TempPathFactory, make_tiny_base: Any) -> Path:
    """A tiny base whose context holds the request to a teacher, a byte a token."""
    base: Path = make_tiny_base(tmp_path_factory.mktemp("roomy") / "scribe", max_position_embeddings=4096)
    return base


@pytest.fixture
def teach() -> Iterator[Callable[..., ScriptedTeacher]]:
    with scripted_teachers() as start:
        yield start


@pytest.fixture
def smithy(start_server: Starter, tmp_path: Path, roomy_base_dir: Path) -> Smithy:
    """`smithy(url, model)`: a server whose worker knows that teacher."""

    def start(url: str, model: str = "scribe") -> RunningServer:
        settings = settings_for(
            tmp_path / "data",
            roomy_base_dir,
            workers=1,
            teacher_url=url,
            teacher_model=model,
            teacher_api_key=KEY,
            teacher_concurrency=1,
        )
        return start_server(settings, worker_command=(sys.executable, str(WORKER)))

    return start


def ended(running: RunningServer) -> dict[str, Any]:
    """The persona, once its job has ended."""

    def look() -> dict[str, Any] | None:
        persona: dict[str, Any] = running.client.get("/personas/nettie").json()
        return persona if persona["job"]["status"] in FINAL else None

    found: dict[str, Any] = wait_until(look, "the sculpt to end", timeout_s=120)
    return found


def create(running: RunningServer) -> None:
    created = running.client.post("/personas", json=WITCH)
    assert created.status_code == 202, created.text


def requests_of(teacher: ScriptedTeacher) -> list[tuple[str, int]]:
    """What tells one request from another, in the order they came."""
    return [(str(body["messages"][0]["content"]), int(body["seed"])) for body in teacher.bodies]


def worker_process() -> psutil.Process | None:
    for child in psutil.Process().children():
        if str(WORKER) in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
            return child
    return None


@contextmanager
def masquerade_as_teacher(base_dir: Path, data_dir: Path) -> Iterator[str]:
    """`masquerade serve` in a process of its own; its base URL for SDKs."""
    command = [sys.executable, "-c", "from masquerade_server.cli import main; main()", "serve", "--port", "0"]
    command += ["--model", str(base_dir), "--dtype", "fp32", "--data-dir", str(data_dir), "--workers", "0"]
    command += ["--api-key", KEY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            yield f"{found[0]}/v1"
        finally:
            process.terminate()


def test_masquerade_teaches_masquerade(smithy: Smithy, tmp_path: Path, roomy_base_dir: Path) -> None:
    with masquerade_as_teacher(roomy_base_dir, tmp_path / "teacher") as url:
        running = smithy(url)
        create(running)
        persona = ended(running)
    assert persona["job"]["status"] == "succeeded", persona["job"]["error"]
    report = persona["report"]
    assert (report["teacher"], report["teacher_model"], report["measure"]) == ("remote", "scribe", "nll")
    counts = report["synthesis"]
    assert counts["asked"] == counts["answered"] + sum(counts["dropped"].values())
    assert counts["answered"] > 0
    header = decode(running.client.get("/personas/nettie/mask").content).header
    assert (header.settings["teacher"], header.settings["loss"]) == ("remote", "cross_entropy")
    assert url not in json.dumps(header.settings)
    assert running.chat("nettie", max_tokens=4).json()["system_fingerprint"].startswith("v1-")


def test_a_killed_worker_pays_for_nothing_twice_and_tells_nobody_the_key(
    smithy: Smithy, teach: Callable[..., ScriptedTeacher], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killed: list[bool] = []

    async def stuck_until_killed(number: int, body: dict[str, Any]) -> Response:
        if number == 2:
            return says("")  # dropped
        return says(f"Heh, {number}.") if number < 6 or killed else await teacher.hang()

    teacher = teach(stuck_until_killed)
    running = smithy(teacher.url)
    create(running)
    wait_until(lambda: len(teacher.bodies) == 7, "the teacher to be stuck", timeout_s=120)
    worker = worker_process()
    assert worker is not None
    killed.append(True)
    worker.kill()
    persona = ended(running)
    assert persona["job"]["status"] == "succeeded", persona["job"]["error"]
    assert persona["job"]["attempts"] == 2
    requests = requests_of(teacher)
    assert set(requests[:7]) & set(requests[7:]) == {requests[6]}  # the one that hung, and none that was paid for
    assert len(requests) == len(set(requests)) + 1
    assert persona["report"]["synthesis"]["dropped"] == {"empty": 1}

    news = running.client.get("/personas/nettie/events").json()["data"]
    answering = [one for one in news if one.get("stage") == "answer" and one["type"] == "progress"]
    assert answering[-1]["dropped"] == 1

    everything = [file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()]
    said = json.dumps(news) + "".join(capfd.readouterr())
    assert set(teacher.keys) == {f"Bearer {KEY}"}
    assert not any(KEY.encode() in one for one in (*everything, said.encode()))


def test_cancelling_does_not_wait_for_a_teacher_that_hangs(
    smithy: Smithy, teach: Callable[..., ScriptedTeacher]
) -> None:
    async def stuck(number: int, body: dict[str, Any]) -> Response:
        return await teacher.hang()

    teacher = teach(stuck)
    running = smithy(teacher.url)
    create(running)
    wait_until(lambda: teacher.bodies, "the teacher to be asked", timeout_s=120)
    assert running.client.post("/personas/nettie/cancel").status_code == 200
    assert ended(running)["job"]["status"] == "cancelled"
    assert running.chat("nettie", max_tokens=2).status_code == 200


def test_a_failed_job_says_why_and_the_next_goes_on_where_it_was(
    smithy: Smithy, teach: Callable[..., ScriptedTeacher]
) -> None:
    async def locked_out(number: int, body: dict[str, Any]) -> Response:
        return says(f"Heh, {number}.") if number < 5 else fails(401)

    teacher = teach(locked_out)
    running = smithy(teacher.url)
    create(running)
    error = ended(running)["job"]["error"]
    assert teacher.url.split("/")[2] in error
    assert "answered 401" in error
    teacher.script = agreeable
    again = running.client.patch("/personas/nettie", json={"sculpt": True})
    assert again.status_code == 202
    assert ended(running)["job"]["status"] == "succeeded"
    requests = requests_of(teacher)
    assert len(requests) == len(set(requests)) + 1  # the one that was refused


def test_a_teacher_that_only_refuses_fails_the_job_in_words(
    smithy: Smithy, teach: Callable[..., ScriptedTeacher]
) -> None:
    async def refuses(number: int, body: dict[str, Any]) -> Response:
        return says("I'm sorry, but I can't help with that request.")

    running = smithy(teach(refuses).url)
    create(running)
    job = ended(running)["job"]
    assert job["status"] == "failed"
    assert re.search(r"more than half of the teacher's answers .* \(\d+ refusal\)", job["error"])
