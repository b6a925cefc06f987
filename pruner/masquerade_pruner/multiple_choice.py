"""General capability: easy questions with four options, ranked by length-normalised log-likelihood.

An option's score is its log-likelihood divided by its length in UTF-8 bytes, which makes it independent of the
tokenizer (lm-evaluation-harness calls this `acc_norm`). The set that ships is the project's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import SettingError
from masquerade_pruner.bootstrap import mean_interval
from masquerade_pruner.likelihood import Candidate, score
from masquerade_pruner.tree import Forward

Correct = npt.NDArray[np.float64]  # [choices]: 1 where the right option is ranked first, else 0


@dataclass(frozen=True, slots=True)
class Choice:
    """One question; `answer` is the index of its right option."""

    id: str
    topic: str
    question: str
    options: tuple[str, ...]
    answer: int


def load_choices(path: Path | None = None) -> list[Choice]:
    """The set that ships, or a JSONL file of its form. Raises `SettingError`."""
    shipped = resources.files("masquerade_pruner") / "data" / "multiple_choice.jsonl"
    try:
        lines = (shipped if path is None else path).read_text("utf-8").splitlines()
        choices = [_choice(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError("choices", f"{path or shipped} is not a multiple-choice set in JSONL: {error}") from error
    if not choices:
        raise SettingError("choices", f"{path or shipped} holds no question")
    return choices


def _choice(row: dict[str, Any]) -> Choice:
    options = tuple(row["options"])
    if len(options) < 2 or not all(isinstance(one, str) and one for one in options):
        raise ValueError(f"{row['id']} needs two or more options, each a text")
    if row["answer"] not in range(len(options)):
        raise ValueError(f"{row['id']} names option {row['answer']} of {len(options)} as right")
    return Choice(str(row["id"]), str(row.get("topic", "")), row["question"], options, row["answer"])


def answer_choices(
    base: Base,
    model: torch.nn.Module,
    choices: Sequence[Choice],
    forward: Forward,
    *,
    system_prompt: str | None = None,
    between: Callable[[], None] = lambda: None,
) -> Correct:
    """Which questions a model gets right: as plain text, or with `system_prompt` as a chat with the persona."""
    candidates = [_candidate(base, one.question, option, system_prompt) for one in choices for option in one.options]
    found = score(model, candidates, forward, between=between).log_likelihood.numpy()
    lengths = np.array([len(option.encode()) for one in choices for option in one.options])
    ends = np.cumsum([len(one.options) for one in choices])[:-1]
    ranked = np.split(found / lengths, ends)
    return np.array([float(np.argmax(scores) == one.answer) for scores, one in zip(ranked, choices, strict=True)])


def capability(choices: Sequence[Choice], dense: Correct, sculpted: Correct) -> dict[str, Any]:
    """Accuracy of both, and the drop with its paired interval."""
    topics = sorted({one.topic for one in choices})
    members = {topic: np.array([one.topic == topic for one in choices]) for topic in topics}
    return {
        "num_questions": len(choices),
        "chance": round(float(np.mean([1 / len(one.options) for one in choices])), 4),
        "dense": mean_interval(dense).as_dict(),
        "sculpted": mean_interval(sculpted).as_dict(),
        "drop": mean_interval(dense - sculpted).as_dict(),
        "by_topic": {
            topic: {
                "num_questions": int(chosen.sum()),
                "dense": round(float(dense[chosen].mean()), 4),
                "sculpted": round(float(sculpted[chosen].mean()), 4),
            }
            for topic, chosen in members.items()
        },
    }


def _candidate(base: Base, question: str, option: str, system_prompt: str | None) -> Candidate:
    tokenizer = base.tokenizer
    if system_prompt is not None:
        prompt = render_chat(tokenizer, system_prompt, [ChatMessage("user", question)])
        return Candidate(tuple(prompt), tuple(tokenizer(option, add_special_tokens=False)["input_ids"]))
    context = f"Question: {question}\nAnswer:"
    prompt, whole = (list(tokenizer(text)["input_ids"]) for text in (context, f"{context} {option}"))
    return Candidate(tuple(prompt), tuple(whole[len(prompt) :]))
