"""A job's working directory: one file a finished stage, so that a killed worker goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from masquerade_masks import write_json_atomic
from masquerade_pruner.examples import Example, read_examples, write_examples


class Workdir:
    """Checkpoints of one sculpt; every file appears whole or not at all.

    A directory that holds another spec's checkpoints is cleared on opening.
    """

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        if self.read_json("spec") != spec:
            for file in path.iterdir():
                if file.is_file():
                    file.unlink()
            self.write_json("spec", spec)

    def read_json(self, name: str) -> Any:
        """A stage's JSON, or None where it has not been written."""
        file = self.path / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def write_json(self, name: str, value: Any) -> None:
        """Write a stage's JSON, durably."""
        write_json_atomic(self.path / f"{name}.json", value)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """A saved step, or None."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.is_file() else None

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Save a step by one rename, durably."""
        scratch = self.path / f"{name}.part"
        save_file({key: value.contiguous() for key, value in tensors.items()}, scratch)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(self.path / f"{name}.safetensors")

    def examples_path(self, name: str) -> Path:
        """Where examples of this name are."""
        return self.path / f"{name}.jsonl"

    def read_examples(self, name: str) -> list[Example]:
        """Examples saved so far, with their states."""
        return saved_examples(self.path, name)

    def write_examples(self, name: str, examples: list[Example]) -> None:
        """Save all examples so far; of their states, which take a hundred times the room, those that are not saved."""
        write_examples(self.examples_path(name), examples)
        chunks = _state_files(self.path, name)
        saved = {one for chunk in chunks for one in _names(chunk)}
        new = {one.id: one.dense_states for one in examples if one.dense_states is not None and one.id not in saved}
        if new:
            self.write_tensors(f"{name}-states-{len(chunks)}", new)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Count time spent in a stage, over restarts."""
        spent = self.seconds()
        self.write_json("seconds", spent | {stage: round(spent.get(stage, 0.0) + seconds, 2)})

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return dict(self.read_json("seconds") or {})


def saved_examples(folder: Path, name: str) -> list[Example]:
    """What a `Workdir` in this folder saved of the name, with the states; whose it is is the caller's to know."""
    states: dict[str, torch.Tensor] = {}
    for chunk in _state_files(folder, name):
        states |= load_file(chunk)
    path = folder / f"{name}.jsonl"
    return [replace(one, dense_states=states.get(one.id)) for one in read_examples(path)] if path.is_file() else []


def _state_files(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f"{name}-states-*.safetensors"))


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
