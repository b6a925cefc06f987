"""Synthesis: selected questions, put in context, answered by the teacher, made into examples.

Plain questions and those with a scene line are asked first; their answers then serve as the earlier turns of the rest.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_pruner.context_lines import contexts, load_scenes
from masquerade_pruner.examples import Example
from masquerade_pruner.instructions import Instruction
from masquerade_pruner.teacher import Answer, Ask, Teacher

Scored = tuple[Instruction, float]  # a question and its sensitivity

# Dropped answers beyond the usable ones that are taken for a teacher that will not do: of one that drops 40 % of its
# answers, 1 in 1,000 would be judged so wrongly; one that drops all is found out after 17.
_HOPELESS = 16


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
    on_dropped: Callable[[str, str], None] = lambda planned_id, reason: None,
) -> list[Example]:
    """Have the teacher answer what is planned; `earlier` examples of the same persona are the turns before.

    An answer that is unusable, or that has no token, is dropped: there is nothing to learn from it.
    """
    by_id = {one.id: one for one in planned}
    prompts = {one.id: _prompt(base, system_prompt, one, earlier) for one in planned}
    asks = [
        Ask(one.id, prompts[one.id], one.instruction.text, one.instruction.output, one.seed, one.scene)
        for one in planned
    ]
    examples = []
    with closing(teacher.answer(asks, max_tokens=max_tokens)) as answers:
        for given in answers:
            if given.unusable or not given.tokens:
                on_dropped(given.ask_id, given.unusable or "empty")
                continue
            example = _example(by_id[given.ask_id], prompts[given.ask_id], given)
            examples.append(example)
            on_example(example)
    return examples


class Tally:
    """What became of the questions that a teacher was asked."""

    def __init__(self, dropped: Mapping[str, str] | None = None) -> None:
        self.dropped = dict(dropped or {})  # the reason, by the planned question's id
        self._answered = 0
        self._cut = 0

    def keep(self, example: Example) -> None:
        """Count a usable answer."""
        self._answered += 1
        self._cut += not example.ended

    def drop(self, planned_id: str, reason: str) -> None:
        """Count one that nothing is learned from."""
        self.dropped[planned_id] = reason

    @property
    def hopeless(self) -> bool:
        """Whether so much more was dropped than kept that asking on is in vain."""
        return len(self.dropped) - self._answered > _HOPELESS

    @property
    def mostly_dropped(self) -> bool:
        """Whether more than half was dropped."""
        return len(self.dropped) > self._answered

    def complaint(self) -> str:
        """Why the job fails for it, in a sentence."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons().items())
        return (
            f"more than half of the teacher's answers cannot be used: of {self._asked}, {len(self.dropped)} were "
            f"dropped ({reasons}); another teacher, or another persona text, may do better"
        )

    def as_dict(self) -> dict[str, Any]:
        """For reports: `cut` answers are among the answered; their end is not learned."""
        return {"asked": self._asked, "answered": self._answered, "cut": self._cut, "dropped": self._reasons()}

    @property
    def _asked(self) -> int:
        return self._answered + len(self.dropped)

    def _reasons(self) -> dict[str, int]:
        return dict(Counter(self.dropped.values()).most_common())


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
        dense_states=given.dense_states,
    )
