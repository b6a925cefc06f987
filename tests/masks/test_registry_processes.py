"""The registry between processes, and after one of them was killed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from masquerade_masks import Job, Persona, PersonaNotFound, SQLiteRegistry

Start = Callable[..., subprocess.Popen[str]]


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, run_python: Start) -> None:
    code = """
import itertools, sys
from pathlib import Path
from masquerade_masks import Job, Persona, SQLiteRegistry
registry = SQLiteRegistry(Path(sys.argv[1]))
for number in itertools.count():
    name = f"p{number}"
    job = Job("j" + name, name)
    registry.create_persona(Persona(name, name, "text", "prompt"), job, "key" + name, "body")
    print(name, flush=True)
"""
    path = tmp_path / "registry.db"
    child = run_python(code, path)
    assert child.stdout is not None
    acknowledged = [child.stdout.readline().strip() for _ in range(40)]
    child.kill()  # in the middle of some later write
    acknowledged += child.communicate(timeout=60)[0].split()
    assert len(set(acknowledged)) == len(acknowledged) >= 40
    with SQLiteRegistry(path) as registry:
        for name in acknowledged:
            assert registry.get_persona(name).text == "text"
            assert registry.get_job("j" + name).status == "queued"
            assert [event.type for event in registry.events_after(name)] == ["created", "queued"]
        stored = {each.id for each in registry.list_personas(limit=100_000)}
        assert len(stored) - len(acknowledged) in (0, 1)  # one may have been stored and not yet said
        replay = registry.create_persona(Persona("p0", "p0", "text", "prompt"), Job("x", "p0"), "keyp0", "body")
        assert not replay[2]
        assert replay[1] == registry.get_job("jp0")


def test_a_write_cut_off_by_kill_9_leaves_nothing_and_no_lock(tmp_path: Path, run_python: Start) -> None:
    code = """
import sys, time
from pathlib import Path
from masquerade_masks import Persona, SQLiteRegistry
from masquerade_masks.registry.sqlite import _put_persona
registry = SQLiteRegistry(Path(sys.argv[1]))
with registry._connections.write() as connection:
    _put_persona(connection, Persona("half", "half", "text", "prompt"))
    print("written, not committed", flush=True)
    time.sleep(600)
"""
    path = tmp_path / "registry.db"
    child = run_python(code, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "written, not committed\n"
    child.kill()
    child.communicate(timeout=60)
    with SQLiteRegistry(path) as registry:
        with pytest.raises(PersonaNotFound):
            registry.get_persona("half")
        assert registry.create_persona(Persona("half", "half", "text", "prompt"))[2]


def test_of_several_processes_exactly_one_claims_a_job(tmp_path: Path, run_python: Start) -> None:
    code = """
import sys
from pathlib import Path
from masquerade_masks import SQLiteRegistry
sys.stdin.readline()
with SQLiteRegistry(Path(sys.argv[1])) as registry:
    while (job := registry.claim_job(sys.argv[2], 60)) is not None:
        print(job.id)
"""
    path = tmp_path / "registry.db"
    with SQLiteRegistry(path) as registry:
        for number in range(40):
            name = f"p{number}"
            registry.create_persona(Persona(name, name, "text", "prompt"), Job(f"j{number}", name))
        children = [run_python(code, path, f"worker-{number}") for number in range(3)]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        claims = [line for child in children for line in child.communicate(timeout=60)[0].split()]
        assert sorted(claims) == sorted(f"j{number}" for number in range(40))
        assert {registry.get_job(claim).attempts for claim in claims} == {1}


def test_the_job_of_a_killed_worker_is_claimed_when_its_lease_ends(tmp_path: Path, run_python: Start) -> None:
    code = """
import sys, time
from pathlib import Path
from masquerade_masks import SQLiteRegistry
registry = SQLiteRegistry(Path(sys.argv[1]))
job = registry.claim_job("dead", 0.5)
registry.report_progress(job.id, "learn", 5, 60)
print(job.id, flush=True)
time.sleep(600)
"""
    path = tmp_path / "registry.db"
    with SQLiteRegistry(path) as registry:
        registry.create_persona(Persona("inn", "inn", "text", "prompt"), Job("j1", "inn"))
        child = run_python(code, path)
        assert child.stdout is not None
        assert child.stdout.readline() == "j1\n"
        child.kill()
        child.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while (job := registry.claim_job("next", 60)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job is not None
        assert (job.id, job.attempts, job.stage, job.completed) == ("j1", 2, "learn", 5)


def test_another_process_sees_a_publication(tmp_path: Path, run_python: Start) -> None:
    code = """
import sys
from pathlib import Path
from masquerade_masks import SQLiteRegistry, Version
with SQLiteRegistry(Path(sys.argv[1])) as registry:
    job = registry.claim_job("w", 60)
    version = Version("inn", 1, "aa" * 32, "text", "prompt", "", 0.25, "none", 64, 96, 700, "sculpt")
    registry.add_version(version, serve=True, job_id=job.id, worker="w")
"""
    path = tmp_path / "registry.db"
    with SQLiteRegistry(path) as registry:
        registry.create_persona(Persona("inn", "inn", "text", "prompt"), Job("j1", "inn"))
        seen = registry.last_seq()
        assert run_python(code, path).wait(timeout=60) == 0
        events = registry.changes_after(seen)
        assert [event.type for event in events] == ["started", "published", "succeeded"]
        assert registry.get_persona("inn").version == 1
