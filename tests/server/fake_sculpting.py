"""A sculptor that learns nothing, in steps that a test can watch: with progress, checkpoints and cancellation.

Run as a script it is a worker process. The persona's text says what happens: `slow` takes its time, `dies` kills the
process in step 3 of every attempt, `fails` raises, `disk` meets a full one. It never asks its teacher.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_masks import FFNShape, Mask, SculptCancelled, SubNetwork, fingerprint_directory
from masquerade_server import worker
from masquerade_server.jobs import WorkerConfig
from masquerade_server.worker import Sculpting

STEPS = 20


@dataclass(frozen=True, slots=True)
class Spec:
    persona_id: str
    name: str
    text: str
    sparsity: float
    preset: str
    seed: int
    recovery: str
    teacher: str


@dataclass(frozen=True, slots=True)
class Progress:
    stage: str
    completed: int
    total: int
    eta_s: float | None
    loss: float | None
    message: str
    dropped: int = 0


def sculpt(
    spec: Spec,
    base: Any,
    workdir: Path,
    *,
    cache_dir: Path,
    teacher: Any = None,
    cast: Sequence[Mask] = (),
    progress: Callable[[Progress], None],
    cancelled: Callable[[], bool] = lambda: False,
    execution: Any = None,
) -> Any:
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint = workdir / "step.json"
    first = json.loads(checkpoint.read_text())["step"] if checkpoint.is_file() else 0
    for step in range(first, STEPS):
        if cancelled():
            raise SculptCancelled
        progress(Progress("learn", step, STEPS, float(STEPS - step), 1.0 / (step + 1), f"from {first}"))
        misbehave(spec.text, step)
        time.sleep(0.1 if "slow" in spec.text else 0.001)
        checkpoint.write_text(json.dumps({"step": step + 1}))
    progress(Progress("evaluate", 1, 1, 0.0, None, "done"))
    return result(spec, base, workdir, len(cast), teacher)


def misbehave(text: str, step: int) -> None:
    if "dies" in text and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if "fails" in text:
        raise ZeroDivisionError("a secret of the server")
    if "disk" in text:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")


def result(spec: Spec, base: Any, workdir: Path, cast_size: int, teacher: Any) -> Any:
    examples = workdir / "examples.jsonl"
    examples.write_text(json.dumps({"question": "Tea?", "answer_text": "Aye.", "prompt": [1, 2]}) + "\n")
    prompt = persona_system_prompt(spec.name, spec.text)
    return SimpleNamespace(
        subnetwork=subnetwork(base, spec.seed),
        recovery=spec.recovery,
        settings={"preset": spec.preset, "seed": spec.seed, "sparsity": spec.sparsity},
        system_prompt=prompt,
        prompt_sha256=prompt_sha256(prompt),
        report={"kept": 48, "cast": cast_size} | ({} if teacher is None else {"teacher_model": teacher.name}),
        examples_path=examples,
        seconds={"learn": 1.0},
    )


def subnetwork(base: Any, seed: int) -> SubNetwork:
    shape = base.shape
    order = np.random.default_rng(seed).random((shape.num_layers, shape.intermediate_size)).argsort(axis=1)
    kept = shape.intermediate_size // 2
    return SubNetwork(base.fingerprint, shape, Mask.from_kept_indices(order[:, :kept], shape.intermediate_size))


def load_sculpting(config: WorkerConfig) -> Sculpting:
    """In place of the real one, without torch: a worker process starts in a quarter of a second."""
    described = json.loads((Path(config.model) / "config.json").read_text())
    shape = FFNShape(described["num_hidden_layers"], described["intermediate_size"], described["hidden_size"])
    fingerprint = fingerprint_directory(Path(config.model), Path(config.cache_dir))
    base: Any = SimpleNamespace(fingerprint=fingerprint, shape=shape)
    return Sculpting(sculpt, Spec, lambda spec, base: {}, base)


if __name__ == "__main__":
    worker.load_sculpting = load_sculpting
    worker.main()
