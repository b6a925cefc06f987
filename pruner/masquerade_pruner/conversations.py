"""Conversations: scripted user turns, and a persona that lives with what it has said before.

Each model holds its own conversation: its answers are its own earlier turns. KL is measured turn by turn on the dense
model's conversation; free-running figures are of the sub-network's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import SettingError
from masquerade_pruner.evaluation import repetition, stop_rate
from masquerade_pruner.examples import Example
from masquerade_pruner.teacher import Ask, Teacher

ECHO_TOKENS = 4  # a run of so many tokens that an earlier answer held is an echo


@dataclass(frozen=True, slots=True)
class Script:
    """One scene and what the user says in it."""

    id: str
    scene: str
    turns: tuple[str, ...]


def load_scripts(path: Path | None = None) -> list[Script]:
    """The scripts that ship (ten turns each), or a JSON file of their form. Raises `SettingError`."""
    shipped = resources.files("masquerade_pruner") / "data" / "conversations.json"
    try:
        rows = json.loads((shipped if path is None else path).read_text("utf-8"))
        scripts = [Script(row["id"], row["scene"], tuple(row["turns"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError("conversations", f"{path or shipped} is not a list of scripts in JSON: {error}") from error
    if not scripts or not all(one.turns for one in scripts):
        raise SettingError("conversations", f"{path or shipped} holds no script, or one without turns")
    return scripts


def converse(
    base: Base,
    teacher: Teacher,
    system_prompt: str,
    scripts: Sequence[Script],
    *,
    num_turns: int,
    max_tokens: int,
    context_length: int,
    seed: int,
    on_turn: Callable[[], None] = lambda: None,
) -> list[list[Example]]:
    """Each script's conversation, all of them going on side by side; one example a turn.

    A conversation ends early where its next turn would not fit the context, or was answered with nothing.
    """
    held: list[list[Example]] = [[] for _ in scripts]
    going = list(range(len(scripts)))
    for turn in range(num_turns):
        asks: dict[str, tuple[int, Ask]] = {}
        for index in going:
            script = scripts[index]
            if turn >= len(script.turns):
                continue
            prompt = _prompt(base, system_prompt, script, held[index])
            if len(prompt) + max_tokens <= context_length:
                ask_id = f"{script.id}/turn-{turn + 1}"
                draw = random.Random(f"{ask_id} {seed}").getrandbits(31)
                asks[ask_id] = index, Ask(ask_id, prompt, script.turns[turn], "", draw)
        answered = []
        for answer in teacher.answer([ask for _, ask in asks.values()], max_tokens=max_tokens):
            if answer.tokens:
                index, ask = asks[answer.ask_id]
                script = scripts[index]
                held[index].append(
                    Example(
                        id=ask.id,
                        question_id=ask.id,
                        topic=script.id,
                        split="test",
                        question=ask.question,
                        answer_text=answer.text,
                        sensitivity=None,
                        prompt=ask.prompt,
                        answer=answer.tokens,
                        ended=answer.ended,
                        scene=script.scene,
                        num_earlier_turns=turn,
                    )
                )
                answered.append(index)
        going = sorted(answered)
        on_turn()
    return held


def _prompt(base: Base, system_prompt: str, script: Script, earlier: Sequence[Example]) -> tuple[int, ...]:
    messages = [ChatMessage("system", script.scene)]
    for one in earlier:
        messages += [ChatMessage("user", one.question), ChatMessage("assistant", one.answer_text.strip())]
    messages.append(ChatMessage("user", script.turns[len(earlier)]))
    return tuple(render_chat(base.tokenizer, system_prompt, messages))


def at_turn(conversations: Sequence[Sequence[Example]], turn: int) -> list[Example]:
    """The answers at turn number `turn`, the first being 0, of the conversations that reached it."""
    return [one[turn] for one in conversations if len(one) > turn]


def free_figures(conversations: Sequence[Sequence[Example]], turn: int) -> dict[str, Any]:
    """How one model's answers of a turn end and repeat, within themselves and what was said before."""
    answers = at_turn(conversations, turn)
    return {
        "num_conversations": len(answers),
        "stop_rate": stop_rate(answers),
        "repetition": repetition(answers),
        "echo": round(float(np.mean([_echo(one, turn) for one in conversations if len(one) > turn])), 4),
    }


def _echo(conversation: Sequence[Example], turn: int) -> float:
    """Share of an answer's runs of `ECHO_TOKENS` tokens that one of its speaker's earlier answers holds."""
    before = {run for one in conversation[:turn] for run in _runs(one)}
    mine = _runs(conversation[turn])
    return sum(run in before for run in mine) / len(mine) if mine else 0.0


def _runs(example: Example) -> list[tuple[int, ...]]:
    return list(zip(*(example.answer[offset:] for offset in range(ECHO_TOKENS)), strict=False))
