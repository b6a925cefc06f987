"""The answer stage of a sculpt: its questions put to a teacher, answers saved as they come, unusable ones counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from masquerade_engine.base import Base
from masquerade_masks import TeacherError
from masquerade_pruner import synthesis
from masquerade_pruner.examples import Example, write_examples
from masquerade_pruner.instructions import Instruction, spread
from masquerade_pruner.presets import SculptSettings
from masquerade_pruner.progress import Reporter
from masquerade_pruner.teacher import Teacher
from masquerade_pruner.workdir import Workdir

SAVE_EVERY = 64  # answers between two checkpoints

Scored = tuple[Instruction, float]  # a question and its sensitivity


@dataclass(frozen=True, slots=True)
class Selected:
    """The questions of a sculpt."""

    train: list[Scored]
    validation: list[Scored]
    test: list[Scored]


@dataclass(frozen=True, slots=True)
class Answered:
    """The examples that were made of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    test_scenes: list[Example]


class Answering:
    """One run of the stage; in the same directory it goes on at the answers that were saved.

    `teacher` is called for where answers are missing.
    """

    def __init__(
        self,
        base: Base,
        system_prompt: str,
        teacher: Callable[[], Teacher],
        settings: SculptSettings,
        seed: int,
        workdir: Workdir,
        reporter: Reporter,
    ) -> None:
        self._base = base
        self._system_prompt = system_prompt
        self._teacher = teacher
        self._settings = settings
        self._seed = seed
        self._workdir = workdir
        self._reporter = reporter
        self._done = self._total = 0
        self.tally = synthesis.Tally(workdir.read_json("dropped"))

    def run(self, selected: Selected) -> Answered:
        """Every question answered in the persona's voice.

        Raises `TeacherError` where the teacher fails, more than half of its answers are unusable or a split has none.
        """
        settings, seed = self._settings, self._seed
        train = synthesis.plan_training(selected.train, self._samples(selected), settings.context_share, seed)
        plans = {
            "validation": synthesis.plan_held_out(selected.validation, seed),
            "test": synthesis.plan_held_out(selected.test, seed),
            "test_scenes": synthesis.plan_scenes(spread(selected.test, settings.num_test_scenes), seed),
        }
        first, second = synthesis.needs_turns(train[: settings.branches])
        self._done, self._total = 0, len(first) + len(second) + sum(map(len, plans.values()))
        with self._reporter.stage("answer"):
            plain = self._answered("train_plain", first)
            turned = self._answered("train_turns", second, earlier=plain)
            held_out = {name: self._answered(name, planned) for name, planned in plans.items()}
        examples = [*plain, *turned]
        answered = Answered(examples, **held_out)
        self._check(answered)
        write_examples(self._workdir.examples_path("examples"), examples)
        return answered

    def _samples(self, selected: Selected) -> int:
        """Answers a question: no more than the steps can look at once."""
        needed = -(-self._settings.branches // max(1, len(selected.train)))
        return min(self._settings.samples_per_question, needed)

    def _answered(
        self, name: str, planned: Sequence[synthesis.Planned], earlier: Sequence[Example] = ()
    ) -> list[Example]:
        """Answers saved before, and the rest now; saved every so often, in the order of the plan at the end."""
        examples = {one.id: one for one in self._workdir.read_examples(name)}
        for one in examples.values():
            self.tally.keep(one)
        missing = [one for one in planned if one.id not in examples and one.id not in self.tally.dropped]
        before = self._done
        self._done += len(planned) - len(missing)

        def judged() -> None:
            self._done += 1
            if (self._done - before) % SAVE_EVERY == 0:
                self._save(name, examples)
            message = "answering in the persona's voice"
            self._reporter.at(self._done, self._total, message=message, dropped=len(self.tally.dropped))

        def keep(example: Example) -> None:
            examples[example.id] = example
            self.tally.keep(example)
            judged()

        def drop(planned_id: str, reason: str) -> None:
            self.tally.drop(planned_id, reason)
            if self.tally.hopeless:
                self._give_up(self.tally.complaint())
            judged()

        if missing:
            synthesis.answer(
                missing,
                base=self._base,
                system_prompt=self._system_prompt,
                teacher=self._teacher(),
                max_tokens=self._settings.answer_tokens,
                earlier=earlier,
                on_example=keep,
                on_dropped=drop,
            )
            self._save(name, examples)
        return [examples[one.id] for one in planned if one.id in examples]

    def _save(self, name: str, examples: Mapping[str, Example]) -> None:
        self._workdir.write_examples(name, list(examples.values()))
        if self.tally.dropped:
            self._workdir.write_json("dropped", self.tally.dropped)

    def _check(self, answered: Answered) -> None:
        """Raise where nothing can be learned from what was answered."""
        if self.tally.mostly_dropped:
            self._give_up(self.tally.complaint())
        for split in ("train", "validation", "test"):
            if not getattr(answered, split):
                self._give_up(f"none of the teacher's answers to the {split} questions can be used")

    def _give_up(self, complaint: str) -> NoReturn:
        """Fail for the teacher's answers; a later attempt asks anew for those that were dropped."""
        self._workdir.write_json("dropped", {})
        raise TeacherError(complaint)
