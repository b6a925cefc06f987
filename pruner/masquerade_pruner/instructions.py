"""Instruction sets: the questions that personas are sculpted on, split once so that nothing leaks.

The built-in set is split by topic: no topic of the test split is ever trained or tuned on. A set in Alpaca format is
split by topic where it names one and by template (a question's first three words) otherwise. Near-duplicates go.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from masquerade_masks import SettingError

Split = Literal["train", "validation", "test"]
T = TypeVar("T")

VALIDATION_TOPICS = frozenset({"clothing", "friendship", "weather"})
TEST_TOPICS = frozenset({"courage", "dreams", "festivals", "money", "sea"})
NEAR_DUPLICATE = 0.6  # Jaccard of word pairs; 0.6 leaves the built-in set whole and catches refilled templates
MIN_QUESTIONS = {"train": 10, "validation": 4, "test": 4}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One question with its neutral answer."""

    id: str
    topic: str
    text: str
    output: str
    split: Split


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """Questions by split, in a fixed order."""

    train: tuple[Instruction, ...]
    validation: tuple[Instruction, ...]
    test: tuple[Instruction, ...]

    @property
    def digest(self) -> str:
        """sha256 over the questions and their split: what caches about this set are keyed by."""
        lines = [f"{one.split}\x00{one.topic}\x00{one.text}" for one in (*self.train, *self.validation, *self.test)]
        return hashlib.sha256("\x01".join(lines).encode()).hexdigest()


def load_instructions(path: Path | None = None) -> InstructionSet:
    """The built-in set, or an Alpaca-format `.json` or `.jsonl` file in its place.

    Raises `SettingError("instructions", ...)` for a file that is not one or leaves a split too small.
    """
    return _builtin() if path is None else _alpaca(path)


def _builtin() -> InstructionSet:
    folder = resources.files("masquerade_pruner") / "data" / "instructions"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".jsonl")), key=lambda file: file.name)
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return _split(
        Instruction(row["id"], row["topic"], row["instruction"], row["output"], _builtin_split(row["topic"]))
        for row in rows
    )


def _builtin_split(topic: str) -> Split:
    if topic in TEST_TOPICS:
        return "test"
    return "validation" if topic in VALIDATION_TOPICS else "train"


def _alpaca(path: Path) -> InstructionSet:
    found = _split(_alpaca_instruction(index, row) for index, row in enumerate(_alpaca_rows(path)))
    for split, least in MIN_QUESTIONS.items():
        number = len(getattr(found, split))
        if number < least:
            raise SettingError(
                "instructions",
                f"{path.name} leaves {number} {split} questions without near-duplicates; at least {least} are needed",
            )
    return found


def _alpaca_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:
        raise SettingError("instructions", f"{path.name} cannot be read as JSON or JSONL: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingError("instructions", f"{path.name} is not a list of objects")
    return rows


def _alpaca_instruction(index: int, row: dict[str, Any]) -> Instruction:
    text = row.get("instruction")
    if not isinstance(text, str) or not text.strip():
        raise SettingError("instructions", f"entry {index} has no `instruction` text")
    full = "\n".join(part.strip() for part in (text, str(row.get("input") or "")) if part.strip())
    group = str(row.get("topic") or " ".join(_words(text)[:3]))
    return Instruction(str(row.get("id") or index), group, full, str(row.get("output") or ""), _hashed_split(group))


def _hashed_split(group: str) -> Split:
    """70 % train, 10 % validation, 20 % test, by a hash of the group, so a question never changes sides."""
    draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big") / 2**32
    if draw < 0.7:
        return "train"
    return "validation" if draw < 0.8 else "test"


def _split(instructions: Iterable[Instruction]) -> InstructionSet:
    kept = without_near_duplicates(list(instructions))
    by_split: dict[str, list[Instruction]] = {"train": [], "validation": [], "test": []}
    for one in kept:
        by_split[one.split].append(one)
    return InstructionSet(*(tuple(by_split[split]) for split in ("train", "validation", "test")))


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of them, evenly over a list that is in topic order."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def without_near_duplicates(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Drop each question whose word pairs overlap an earlier one's by `NEAR_DUPLICATE` or more."""
    kept: list[Instruction] = []
    seen: list[frozenset[tuple[str, str]]] = []
    holders: dict[tuple[str, str], list[int]] = {}
    for one in instructions:
        words = ["^", *_words(one.text), "$"]
        pairs = frozenset(pairwise(words))
        rivals = {index for pair in pairs for index in holders.get(pair, ())}
        if any(len(pairs & seen[index]) >= NEAR_DUPLICATE * len(pairs | seen[index]) for index in rivals):
            continue
        for pair in pairs:
            holders.setdefault(pair, []).append(len(seen))
        seen.append(pairs)
        kept.append(one)
    return kept


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
