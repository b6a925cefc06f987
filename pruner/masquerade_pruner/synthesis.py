"""Synthesis: selected questions, put in context, answered by the teacher, made into examples.

Plain questions and those with a scene line are asked first; their answers then serve as the earlier turns of the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_pruner.context_lines import contexts, load_scenes
from masquerade_pruner.examples import Example
from masquerade_pruner.instructions import Instruction
from masquerade_pruner.teacher import Answer, Ask, Teacher

Scored = tuple[Instruction, float]  # a question and its sensitivity


@dataclass(frozen=True, slots=True)
class Planned:
    """One question to be answered once."""

    id: str
    instruction: Instruction
    sensitivity: float
    scene: str | None
    num_earlier_turns: int
    seed: int


def plan_training(questions: Sequence[Scored], samples: int, share: float, seed: int) -> list[Planned]:
    """`samples` answers a question; a `share` of them with a scene line or one to four earlier turns."""
    rng = random.Random(f"contexts {seed}")
    drawn = iter(contexts(rng, samples * len(questions), share))
    planned = []
    for sample in range(samples):
        for one, score in questions:
            context = next(drawn)
            scene = context if isinstance(context, str) else None
            turns = context if isinstance(context, int) else 0
            planned.append(_planned(one, score, scene, turns, f"{one.id}/{sample}", seed))
    return planned


def plan_held_out(questions: Sequence[Scored], seed: int) -> list[Planned]:
    """One plain answer a question."""
    return [_planned(one, score, None, 0, f"{one.id}/{one.split}", seed) for one, score in questions]


def plan_scenes(questions: Sequence[Scored], seed: int) -> list[Planned]:
    """One answer a question, each under a scene line."""
    scenes = load_scenes()
    return [
        _planned(one, score, scenes[index % len(scenes)], 0, f"{one.id}/scene", seed)
        for index, (one, score) in enumerate(questions)
    ]


def answer(
    planned: Sequence[Planned],
    *,
    base: Base,
    system_prompt: str,
    teacher: Teacher,
    max_tokens: int,
    earlier: Sequence[Example] = (),
    on_example: Callable[[Example], None] = lambda example: None,
) -> list[Example]:
    """Have the teacher answer what is planned; `earlier` examples of the same persona are the turns before.

    An answer without a token is dropped: there is nothing to learn from it.
    """
    by_id = {one.id: one for one in planned}
    prompts = {one.id: _prompt(base, system_prompt, one, earlier) for one in planned}
    asks = [Ask(one.id, prompts[one.id], one.instruction.text, one.instruction.output, one.seed) for one in planned]
    examples = []
    for given in teacher.answer(asks, max_tokens=max_tokens):
        if given.tokens:
            example = _example(by_id[given.ask_id], prompts[given.ask_id], given)
            examples.append(example)
            on_example(example)
    return examples


def needs_turns(planned: Sequence[Planned]) -> tuple[list[Planned], list[Planned]]:
    """Those that can be asked at once, and those that wait for answers to be their earlier turns."""
    return [one for one in planned if not one.num_earlier_turns], [one for one in planned if one.num_earlier_turns]


def _planned(
    instruction: Instruction, score: float, scene: str | None, turns: int, planned_id: str, seed: int
) -> Planned:
    return Planned(planned_id, instruction, score, scene, turns, random.Random(f"{planned_id} {seed}").getrandbits(31))


def _prompt(base: Base, system_prompt: str, planned: Planned, earlier: Sequence[Example]) -> tuple[int, ...]:
    messages = [] if planned.scene is None else [ChatMessage("system", planned.scene)]
    if planned.num_earlier_turns:
        rng = random.Random(f"turns {planned.seed}")
        others = [one for one in earlier if one.question_id != planned.instruction.id and one.scene is None]
        for one in rng.sample(others, min(planned.num_earlier_turns, len(others))):
            messages += [ChatMessage("user", one.question), ChatMessage("assistant", one.answer_text.strip())]
    messages.append(ChatMessage("user", planned.instruction.text))
    return tuple(render_chat(base.tokenizer, system_prompt, messages))


def _example(planned: Planned, prompt: tuple[int, ...], given: Answer) -> Example:
    return Example(
        id=planned.id,
        question_id=planned.instruction.id,
        topic=planned.instruction.topic,
        split=planned.instruction.split,
        question=planned.instruction.text,
        answer_text=given.text,
        sensitivity=round(planned.sensitivity, 6),
        prompt=prompt,
        answer=given.tokens,
        ended=given.ended,
        scene=planned.scene,
        num_earlier_turns=planned.num_earlier_turns,
    )
