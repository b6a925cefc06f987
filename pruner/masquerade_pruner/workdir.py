"""A job's working directory: one file a finished stage, so that a killed worker goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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
        """Save a step by one rename."""
        scratch = self.path / f"{name}.part"
        save_file({key: value.contiguous() for key, value in tensors.items()}, scratch)
        scratch.replace(self.path / f"{name}.safetensors")

    def examples_path(self, name: str) -> Path:
        """Where examples of this name are."""
        return self.path / f"{name}.jsonl"

    def read_examples(self, name: str) -> list[Example]:
        """Examples saved so far."""
        path = self.examples_path(name)
        return read_examples(path) if path.is_file() else []

    def write_examples(self, name: str, examples: list[Example]) -> None:
        """Save all examples so far."""
        write_examples(self.examples_path(name), examples)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Count time spent in a stage, over restarts."""
        spent = self.seconds()
        self.write_json("seconds", spent | {stage: round(spent.get(stage, 0.0) + seconds, 2)})

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return dict(self.read_json("seconds") or {})
