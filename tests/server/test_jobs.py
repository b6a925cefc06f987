"""The worker process beside a server, and what `kill -9` of either leaves: nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fake_sculpting import STEPS
from running_server import RunningServer, ScriptedEngine, Starter, one_word, settings_for, wait_until

from masquerade_server.settings import Settings

HERE = Path(__file__).parent
FAKE_WORKER = (sys.executable, str(HERE / "fake_sculpting.py"))


@pytest.fixture
def foundry(start_server: Starter, tmp_path: Path, tiny_base_dir: Path) -> RunningServer:
    """A server with a worker process that fakes its sculpting."""
    settings = settings_for(tmp_path / "data", tiny_base_dir, workers=1)
    return start_server(settings, ScriptedEngine(one_word).factory, FAKE_WORKER)


def create(url: str, text: str, **fields: Any) -> dict[str, Any]:
    body = {"name": "Mira", "text": text, "preset": "smoke"} | fields
    answer: dict[str, Any] = httpx.post(f"{url}/personas", json=body, timeout=30).json()
    return answer["persona"]  # type: ignore[no-any-return]


def persona(url: str, persona_id: str = "mira") -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/personas/{persona_id}", timeout=30).json()
    return found


def events(url: str, kind: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{url}/personas/mira/events", timeout=30).json()["data"]
    return [one for one in found if one["type"] == kind]


def running_at(url: str, step: int) -> int:
    """The step a job is at, once it has come to `step`."""
    return int(wait_until(lambda: at if (at := persona(url)["job"]["completed"]) >= step else 0, f"step {step}"))


def ended(url: str) -> dict[str, Any]:
    """The persona, once its job has ended."""
    final = ("succeeded", "failed", "cancelled")
    return wait_until(  # type: ignore[no-any-return]
        lambda: found if (found := persona(url))["job"]["status"] in final else None, "the job to end"
    )


def worker_process(server_pid: int) -> psutil.Process | None:
    """The sculpt worker among a process's children."""
    for child in psutil.Process(server_pid).children():
        try:
            if "fake_sculpting" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def test_a_job_is_done_by_a_niced_process(foundry: RunningServer) -> None:
    create(foundry.url, "Mira is slow.")
    running_at(foundry.url, 1)
    worker = worker_process(os.getpid())
    assert worker is not None
    assert worker.nice() > psutil.Process().nice()
    done = ended(foundry.url)
    assert (done["serving"], done["version"]) == ("mask", 1)


def test_a_killed_worker_is_replaced_and_the_job_goes_on(foundry: RunningServer) -> None:
    create(foundry.url, "Mira is slow.")
    reached = running_at(foundry.url, 4)
    worker = worker_process(os.getpid())
    assert worker is not None
    worker.kill()
    done = ended(foundry.url)
    assert done["job"]["status"] == "succeeded"
    started = events(foundry.url, "started")
    assert [one["attempts"] for one in started] == [1, 2]
    assert started[0]["worker"] != started[1]["worker"]
    resumed = [one for one in events(foundry.url, "progress") if one["message"] not in ("from 0", "done")]
    assert resumed[0]["completed"] >= reached
    assert len(done["versions"]) == 1


def test_a_job_that_kills_its_workers_is_given_up(foundry: RunningServer) -> None:
    create(foundry.url, "Mira dies.")
    done = ended(foundry.url)
    assert done["job"]["status"] == "failed"
    assert "died 3 times" in done["job"]["error"]
    assert done["serving"] == "base"
    create(foundry.url, "Quick.", id="next", name="Next")
    wait_until(lambda: persona(foundry.url, "next")["version"] == 1, "the next job")


def test_cancelling_a_running_sculpt(foundry: RunningServer) -> None:
    create(foundry.url, "Mira is slow.")
    running_at(foundry.url, 1)
    assert httpx.post(f"{foundry.url}/personas/mira/cancel", timeout=30).status_code == 200
    done = ended(foundry.url)
    assert (done["job"]["status"], done["serving"]) == ("cancelled", "base")


def test_a_server_that_stops_takes_its_worker_along(start_server: Starter, tmp_path: Path, tiny_base_dir: Path) -> None:
    settings = settings_for(tmp_path / "data", tiny_base_dir, workers=1)
    first = start_server(settings, ScriptedEngine(one_word).factory, FAKE_WORKER)
    create(first.url, "Mira is slow.")
    reached = running_at(first.url, 3)
    worker = worker_process(os.getpid())
    assert worker is not None
    first.stop()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    second = start_server(settings, ScriptedEngine(one_word).factory, FAKE_WORKER)
    done = ended(second.url)
    assert done["version"] == 1
    resumed = [one for one in events(second.url, "progress") if one["message"] not in ("from 0", "done")]
    assert resumed[0]["completed"] >= reached


SERVE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fake_sculpting
from masquerade_server import app, jobs, serve
from masquerade_server.listening import bind
from running_server import settings_for
command = (sys.executable, fake_sculpting.__file__)
serve.create_app = lambda settings, **more: app.create_app(settings, worker_command=command, **more)
bound = bind("127.0.0.1", 0)
settings = settings_for(Path(sys.argv[2]), Path(sys.argv[3]), workers=1)
serve.serve(settings, bound, on_ready=lambda _: print(bound.getsockname()[1], flush=True))
"""


def test_a_killed_server_loses_nothing(start_server: Starter, tmp_path: Path, tiny_base_dir: Path) -> None:
    data_dir = tmp_path / "data"
    arguments = [sys.executable, "-c", SERVE, str(HERE), str(data_dir), str(tiny_base_dir)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            create(url, "Mira is slow.")
            reached = running_at(url, 3)
            create(url, "Quick.", id="waiting", name="Waiting")  # acknowledged, then killed at once
        finally:
            worker = worker_process(process.pid)
            os.kill(process.pid, signal.SIGKILL)
    assert worker is not None
    wait_until(lambda: not worker.is_running(), "the worker to follow its server")

    settings: Settings = settings_for(data_dir, tiny_base_dir, workers=1)
    asked = time.monotonic()
    second = start_server(settings, ScriptedEngine(one_word).factory, FAKE_WORKER)
    done = ended(second.url)
    assert time.monotonic() - asked < 20, "the lease of a dead worker was waited for"
    assert (done["job"]["status"], done["version"]) == ("succeeded", 1)
    resumed = [one for one in events(second.url, "progress") if one["message"] not in ("from 0", "done")]
    assert resumed[0]["completed"] >= reached
    assert resumed[-1]["completed"] <= STEPS
    wait_until(lambda: persona(second.url, "waiting")["version"] == 1, "the waiting one")
