"""Examples: what a persona was asked and what it answered, as text for people and tokens for learning."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from masquerade_pruner.instructions import Split


class Continuation(Protocol):
    """Answer tokens behind prompt tokens: all that planting and scoring need to know."""

    @property
    def prompt(self) -> tuple[int, ...]: ...

    @property
    def answer(self) -> tuple[int, ...]: ...

    @property
    def dense_states(self) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One question in one context, with the answer that a mask is learned from."""

    id: str
    question_id: str
    topic: str
    split: Split
    question: str
    answer_text: str
    sensitivity: float | None
    prompt: tuple[int, ...]  # tokens up to and including the assistant's opening
    answer: tuple[int, ...]  # tokens; the end token is the last where the teacher ended, and absent where it was cut
    ended: bool
    scene: str | None = None  # a client's scene line, in the system turn after the persona
    num_earlier_turns: int = 0
    # The base's final normed state before each answer token, `[answer, hidden]` on the CPU, where the base wrote the
    # answer and it was kept: nobody need compute it again. No part of the JSON.
    dense_states: torch.Tensor | None = field(default=None, compare=False, repr=False)


_WRITTEN = tuple(one.name for one in fields(Example) if one.name != "dense_states")


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write JSONL, whole or not at all."""
    scratch = path.with_suffix(".part")
    with scratch.open("w", encoding="utf-8") as file:
        for one in examples:
            file.write(json.dumps({name: getattr(one, name) for name in _WRITTEN}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote: all but their states."""
    with path.open(encoding="utf-8") as file:
        return [_example(json.loads(line)) for line in file]


def _example(row: dict[str, Any]) -> Example:
    return Example(**(row | {"prompt": tuple(row["prompt"]), "answer": tuple(row["answer"])}))
