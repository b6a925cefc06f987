"""Question files of others: persona-vectors' JSON and RoleBench's JSONL.

persona-vectors (arXiv 2507.21509): `{"instruction": [{"pos", "neg"}], "questions": [...], "eval_prompt"}`. Each `pos`
is a scene line here; `neg` has no use, for a persona is never asked to be its opposite. RoleBench (arXiv 2310.00746):
lines of `{"role", "question", "generated"}`, `generated` the reference answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masquerade_masks import SettingError


@dataclass(frozen=True, slots=True)
class FileQuestion:
    """One question, with the answers that the file holds to be good."""

    text: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """What a question file asks."""

    name: str
    questions: tuple[FileQuestion, ...]
    scenes: tuple[str, ...] = ()  # the `pos` instructions
    eval_prompt: str | None = None  # for a judge; holds {question} and {answer}
    role: str | None = None  # RoleBench: the one whose questions were taken; None: everybody's


def load_questions(path: Path, *, persona_name: str = "") -> QuestionFile:
    """Read either form. Of a RoleBench file the persona's own rows are taken where it has any, else all.

    Raises `SettingError` for a file that is neither.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("questions", f"{path} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        return _role_bench(path.name, text, persona_name)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SettingError("questions", f"{path.name} is not JSON: {error}") from error
    return _persona_vectors(path.name, found)


def _persona_vectors(name: str, found: Any) -> QuestionFile:
    if not isinstance(found, dict):
        raise SettingError("questions", f"{name} is not an object with `questions`")
    questions = found.get("questions")
    if not isinstance(questions, list) or not questions or not all(_is_text(one) for one in questions):
        raise SettingError("questions", f"{name}: `questions` must be a list of texts")
    instructions = found.get("instruction", [])
    if not isinstance(instructions, list) or not all(
        isinstance(one, dict) and _is_text(one.get("pos")) for one in instructions
    ):
        raise SettingError("questions", f"{name}: `instruction` must be a list of objects with a `pos` text")
    eval_prompt = found.get("eval_prompt")
    if eval_prompt is not None and not (_is_text(eval_prompt) and "{answer}" in eval_prompt):
        raise SettingError("questions", f"{name}: `eval_prompt` must be a text that holds {{answer}}")
    return QuestionFile(
        name,
        tuple(FileQuestion(one) for one in questions),
        scenes=tuple(one["pos"] for one in instructions),
        eval_prompt=eval_prompt,
    )


def _role_bench(name: str, text: str, persona_name: str) -> QuestionFile:
    rows = [_role_bench_row(name, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise SettingError("questions", f"{name} holds no question")
    wanted = persona_name.casefold()
    own = [(role, question) for role, question in rows if role.casefold() == wanted]
    chosen = own or rows
    return QuestionFile(name, tuple(question for _, question in chosen), role=own[0][0] if own else None)


def _role_bench_row(name: str, number: int, line: str) -> tuple[str, FileQuestion]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SettingError("questions", f"{name}, line {number}, is not JSON: {error}") from error
    if not isinstance(row, dict) or not _is_text(row.get("question")):
        raise SettingError("questions", f"{name}, line {number}, has no `question` text")
    generated = row.get("generated", [])
    generated = [generated] if isinstance(generated, str) else generated
    if not isinstance(generated, Sequence) or not all(isinstance(one, str) for one in generated):
        raise SettingError("questions", f"{name}, line {number}: `generated` must be a list of texts")
    references = tuple(one.strip() for one in generated if one.strip())
    return str(row.get("role", "")), FileQuestion(row["question"].strip(), references)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
