"""Appraise: a published sub-network beside the dense persona, on what nothing was chosen by.

Five parts, each by itself: `test` (the built-in test split, plain and under scene lines), `discrimination`,
`capability` (multiple choice, and tasks of lm-evaluation-harness), `questions` (a file's) and `conversations`.
One-turn, with-scene and many-turn figures are kept apart. The same seed gives the same report on the same machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, prompt_sha256, render_chat
from masquerade_masks import SettingError, SubNetwork, utc_now
from masquerade_pruner import conversations, discrimination, evaluation, lm_eval_tasks, multiple_choice, synthesis
from masquerade_pruner.applied import applied
from masquerade_pruner.bootstrap import mean_interval
from masquerade_pruner.changes import Change
from masquerade_pruner.discrimination import Contest
from masquerade_pruner.evaluation import FreeRunning
from masquerade_pruner.examples import Example, read_examples
from masquerade_pruner.held_out import Divergence, HeldOut
from masquerade_pruner.importance import baseline_scores, fluctuation
from masquerade_pruner.instructions import Instruction, InstructionSet, load_instructions, spread
from masquerade_pruner.likelihood import Candidate, score
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.pair import PersonaPair
from masquerade_pruner.question_files import QuestionFile
from masquerade_pruner.sensitivity import load_references, persona_units, reference_pass
from masquerade_pruner.synthesis import Planned
from masquerade_pruner.tree import Forward

FORMAT = "masquerade.eval/1"
PARTS = ("test", "discrimination", "capability", "questions", "conversations")


@dataclass(frozen=True, slots=True)
class AppraisalSettings:
    """How much is measured. Raises `SettingError`."""

    seed: int = 0
    answer_tokens: int = 64
    num_test: int = 100
    num_test_scenes: int = 32
    num_free_running: int = 48
    num_validation: int = 32  # questions that the strongest baseline is chosen on
    num_importance: int = 64  # examples that the baselines are made from
    num_discrimination: int = 48
    candidate_tokens: int = 32
    num_file_answers: int = 100  # of each kind: plain, and under `pos` lines
    num_conversations: int = 8
    turns: int = 0  # of each conversation; 0: none are held
    num_choices: int = 1_000_000
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None  # questions a task
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise SettingError("only", f"{part!r} is not one of {', '.join(PARTS)}")


QUICK = AppraisalSettings(
    answer_tokens=32,
    num_test=12,
    num_test_scenes=6,
    num_free_running=6,
    num_validation=6,
    num_importance=16,
    num_discrimination=6,
    candidate_tokens=16,
    num_file_answers=6,
    num_conversations=2,
    num_choices=40,
    lm_eval_limit=20,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A published version of a persona, and what is known around it."""

    persona_id: str
    name: str
    version: int
    system_prompt: str
    subnetwork: SubNetwork
    recovery: str = "none"
    prompt_sha256: str = ""  # of the prompt the mask was learned under
    examples: Path | None = None  # what it was learned from, in the pruner's own form
    others: Mapping[str, SubNetwork] | None = None  # of other personas on the same base


@dataclass(frozen=True, slots=True)
class Spoken:
    """One answer, as a judge or a reader sees it."""

    part: str
    id: str
    model: str  # dense or sculpted
    scene: str | None
    history: tuple[str, ...]  # user and persona in turn
    question: str
    answer: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The report, and every answer behind it."""

    report: dict[str, Any]
    spoken: tuple[Spoken, ...]


OnProgress = Callable[[str, int, int], None]  # part, done, of how many


def appraise(
    subject: Subject,
    base: Base,
    settings: AppraisalSettings,
    *,
    cache_dir: Path,
    instructions: Path | None = None,
    questions: QuestionFile | None = None,
    lm_eval_include: Path | None = None,
    on_progress: OnProgress = lambda part, done, total: None,
) -> Appraisal:
    """Measure a published version.

    Raises `BaseMismatch`, and `SettingError` for an unusable instruction set, attached weights
    that are not at hand, or lm-evaluation-harness asked for and missing, all before anything is run.
    """
    if settings.lm_eval:
        lm_eval_tasks.require_lm_eval()
    if not settings.turns:
        settings = _without(settings, "conversations")
    if questions is None:
        settings = _without(settings, "questions")
    instruction_set = load_instructions(instructions)
    with PersonaPair(base, subject.subnetwork, subject.system_prompt) as pair:
        run = _Appraiser(subject, pair, settings, instruction_set, cache_dir, on_progress)
        return run.appraise(questions, lm_eval_include)


def _without(settings: AppraisalSettings, part: str) -> AppraisalSettings:
    return replace(settings, parts=tuple(one for one in settings.parts if one != part))


class _Appraiser:
    """One run over one subject."""

    def __init__(
        self,
        subject: Subject,
        pair: PersonaPair,
        settings: AppraisalSettings,
        instructions: InstructionSet,
        cache_dir: Path,
        on_progress: OnProgress,
    ) -> None:
        self.subject = subject
        self.pair = pair
        self.settings = settings
        self.instructions = instructions
        self.cache_dir = cache_dir
        self.on_progress = on_progress
        self.spoken: list[Spoken] = []
        self._answers: dict[str, Example] = {}  # the dense persona's, by planned id

    def appraise(self, questions: QuestionFile | None, lm_eval_include: Path | None) -> Appraisal:
        """Every part that was asked for, in the order of `PARTS`."""
        made: dict[str, Callable[[], dict[str, Any]]] = {
            "test": self.test,
            "discrimination": lambda: {"discrimination": self.discrimination()},
            "capability": lambda: {"capability": self.capability(lm_eval_include)},
            "conversations": lambda: {"conversations": self.conversations()},
        }
        if questions is not None:
            made["questions"] = lambda: {"questions": self.questions(questions)}
        report, seconds = self.head(), {}
        for part in (one for one in PARTS if one in self.settings.parts):
            began = time.monotonic()
            self.on_progress(part, 0, 1)
            report |= made[part]()
            seconds[part] = round(time.monotonic() - began, 2)
        return Appraisal(report | {"seconds": seconds}, tuple(self.spoken))

    def head(self) -> dict[str, Any]:
        """What was measured, and with which numbers."""
        subject, base, mask = self.subject, self.pair.base, self.subject.subnetwork.mask
        prompt = prompt_sha256(subject.system_prompt)
        return {
            "format": FORMAT,
            "created": utc_now(),
            "persona": subject.persona_id,
            "name": subject.name,
            "version": subject.version,
            "digest": subject.subnetwork.digest,
            "kept": mask.kept,
            "intermediate_size": mask.intermediate_size,
            "sparsity": round(mask.sparsity, 6),
            "recovery": subject.recovery,
            "prompt_sha256": prompt,
            "learned_under_this_prompt": prompt == subject.prompt_sha256,
            "base": {
                "name": base.name,
                "fingerprint": base.fingerprint,
                "dtype": str(base.dtype).removeprefix("torch."),
            },
            "instructions_sha256": self.instructions.digest,
            "settings": {**asdict(self.settings), "parts": list(self.settings.parts)},
        }

    # the test split

    def test(self) -> dict[str, Any]:
        """Fidelity and free running, plain and under scene lines."""
        settings, pair = self.settings, self.pair
        scored = self._scored_test
        under_scenes = synthesis.plan_scenes(spread(scored, settings.num_test_scenes), settings.seed)
        plain = self._dense("test", self._test_plan)
        scenes = self._dense("test", under_scenes)
        rivals, strongest = self._baselines()
        report: dict[str, Any] = {"baselines": list(rivals), "strongest_baseline": strongest}
        for context, examples in (("one_turn", plain), ("with_scene", scenes)):
            if examples:
                held_out = HeldOut(pair.model, examples)
                fidelity = evaluation.fidelity(held_out, examples, pair.sculpted, rivals, strongest)
                report[context] = fidelity | {"free_running": self._free_running(context, examples, held_out)}
        return report

    @cached_property
    def _scored_test(self) -> list[tuple[Instruction, float]]:
        """Test questions with their sensitivity."""
        chosen = spread(self.instructions.test, self.settings.num_test)
        pair = self.pair
        references = reference_pass(
            pair.base,
            lambda: pair.model,
            self.instructions,
            self.cache_dir,
            on_progress=lambda done, total: self.on_progress("reference personas, once per base", done, total),
        )
        units = persona_units(pair.base, pair.model, self.subject.system_prompt, chosen)
        return [(one, references.sensitivity(one.id, unit)) for one, unit in zip(chosen, units, strict=True)]

    @cached_property
    def _test_plan(self) -> list[Planned]:
        return synthesis.plan_held_out(self._scored_test, self.settings.seed)

    def _dense(self, part: str, planned: Sequence[Planned]) -> list[Example]:
        """The dense persona's answers, each asked for once in a run."""
        missing = [one for one in planned if one.id not in self._answers]
        done = 0

        def count(_example: Example) -> None:
            nonlocal done
            done += 1
            self.on_progress(f"{part}: dense answers", done, len(missing))

        if missing:
            given = self.pair.speak(missing, max_tokens=self.settings.answer_tokens, on_example=count)
            self._answers |= {one.id: one for one in given}
        return [self._answers[one.id] for one in planned if one.id in self._answers]

    def _baselines(self) -> tuple[dict[str, Forward], str]:
        """Masks of the same size without learning, and the one that is closest to dense on validation."""
        settings, pair = self.settings, self.pair
        self.on_progress("test: baselines", 0, 1)
        statistics = fluctuation(pair.model, self._importance_examples())
        kept = self.subject.subnetwork.mask.kept
        masks = {name: top_k_mask(one, kept) for name, one in baseline_scores(pair.model, statistics).items()}
        rivals: dict[str, Forward] = {name: Change.of_mask(pair.model, one).forward for name, one in masks.items()}
        validation = self._plan(spread(self.instructions.validation, settings.num_validation))
        held_out = HeldOut(pair.model, self._dense("test", validation))
        distances = {name: float(held_out.divergence(rival).kl.mean()) for name, rival in rivals.items()}
        return rivals, evaluation.strongest_baseline(distances)

    def _importance_examples(self) -> list[Example]:
        """The first of what the mask was learned from, or else answers to as many training questions."""
        wanted = self.settings.num_importance
        if self.subject.examples is not None:
            return read_examples(self.subject.examples)[:wanted]
        return self._dense("test", self._plan(spread(self.instructions.train, wanted)))

    def _plan(self, questions: Sequence[Instruction]) -> list[Planned]:
        return synthesis.plan_held_out([(one, 0.0) for one in questions], self.settings.seed)

    def _free_running(
        self, part: str, dense: Sequence[Example], held_out: HeldOut, count: int | None = None
    ) -> dict[str, Any]:
        """The sub-network's own answers to some of these questions, beside the dense persona's."""
        places = spread(range(len(dense)), self.settings.num_free_running if count is None else count)
        chosen = [dense[place] for place in places]
        planned = [_again(one, index) for index, one in enumerate(chosen)]
        self.on_progress(f"{part}: the sub-network's answers", 0, len(planned))
        by_id = {one.id: one for one in self.pair.speak(planned, sculpted=True, max_tokens=self.settings.answer_tokens)}
        nll = held_out.dense_nll()[places]
        pairs = [(one, by_id[one.id], own) for one, own in zip(chosen, nll, strict=True) if one.id in by_id]
        if not pairs:
            return {"num_questions": 0}
        ours = [other for _, other, _ in pairs]
        for one, other, _ in pairs:
            self.spoken += [_spoken(part, "dense", one), _spoken(part, "sculpted", other)]
        return evaluation.free_running(
            FreeRunning(
                reference=[one for one, _, _ in pairs],
                sculpted=ours,
                reference_nll=torch.stack([own for _, _, own in pairs]),
                sculpted_nll=HeldOut(self.pair.model, ours).dense_nll(),
            )
        )

    # discrimination

    def discrimination(self) -> dict[str, Any]:
        """Own answer among those of reference personas, by the sub-network, a swapped one, and the base."""
        contests = self._contests()
        if not contests:
            return {"num_questions": 0}
        pair = self.pair
        forwards = {"dense_with_prompt": pair.dense, "sculpted": pair.sculpted}
        swapped = self._swapped()
        if swapped is not None:
            forwards["swapped_mask"] = applied(pair.model, swapped[1])
        passes = 2 * len(forwards) + 1
        total = passes * -(-sum(len(one.candidates) for one in contests) // 32)
        report = discrimination.discriminate(
            pair.model, contests, forwards, between=_Count(self.on_progress, "discrimination: ranking", total)
        )
        return report | {"swapped_mask_of": None if swapped is None else swapped[0]}

    def _contests(self) -> list[Contest]:
        settings = self.settings
        planned = spread(self._test_plan, settings.num_discrimination)
        own = {one.id: one for one in self._dense("discrimination", planned)}
        rng = random.Random(f"references {settings.seed}")
        references = [one for one in load_references() if one.system_prompt != self.subject.system_prompt]
        rivals = rng.sample(references, min(discrimination.NUM_CANDIDATES - 1, len(references)))
        answers: dict[str, list[tuple[int, ...]]] = {one: [] for one in own}
        for number, rival in enumerate(rivals):
            self.on_progress("discrimination: other personas' answers", number, len(rivals))
            for one in self.pair.speak(
                planned, max_tokens=settings.candidate_tokens, system_prompt=rival.system_prompt
            ):
                if one.id in answers:
                    answers[one.id].append(_unended(one))
        found = []
        for one in own.values():
            alone = render_chat(self.pair.base.tokenizer, None, [ChatMessage("user", one.question)])
            given = [_unended(one), *answers[one.id]]
            if len(given) == 1 + len(rivals):
                held = discrimination.contest(
                    one.question_id, one.prompt, tuple(alone), given, settings.candidate_tokens
                )
                found += [] if held is None else [held]
        return found

    def _swapped(self) -> tuple[str, SubNetwork] | None:
        """Another persona's sub-network, the nearest in size."""
        kept = self.subject.subnetwork.mask.kept
        others = [
            (name, one)
            for name, one in (self.subject.others or {}).items()
            if one.base == self.pair.base.fingerprint and (one.weights is not None or not one.attached)
        ]
        return min(others, key=lambda pair: (abs(pair[1].mask.kept - kept), pair[0]), default=None)

    # capability

    def capability(self, lm_eval_include: Path | None) -> dict[str, Any]:
        """Multiple choice as plain text and as a chat with the persona, and what lm-evaluation-harness has."""
        pair, settings = self.pair, self.settings
        choices = spread(multiple_choice.load_choices(), settings.num_choices)
        report: dict[str, Any] = {}
        for context, prompt in (("plain", None), ("in_persona", self.subject.system_prompt)):
            correct = []
            for name, forward in (("dense", pair.dense), ("sculpted", pair.sculpted)):
                total = -(-sum(len(one.options) for one in choices) // 32)
                count = _Count(self.on_progress, f"capability: {context}, {name}", total)
                correct.append(
                    multiple_choice.answer_choices(
                        pair.base, pair.model, choices, forward, system_prompt=prompt, between=count
                    )
                )
            report[context] = multiple_choice.capability(choices, *correct)
        if settings.lm_eval:
            self.on_progress("capability: lm_eval", 0, 1)
            report["lm_eval"] = lm_eval_tasks.run_tasks(
                pair.base,
                pair.model,
                {"dense": pair.dense, "sculpted": pair.sculpted},
                settings.lm_eval,
                limit=settings.lm_eval_limit,
                seed=settings.seed,
                include=lm_eval_include,
            )
        return report

    # a file's questions

    def questions(self, file: QuestionFile) -> dict[str, Any]:
        """Answers to a file's questions: plain, and under its `pos` lines as scenes."""
        settings = self.settings
        asked = [
            Instruction(f"{index}", file.name, one.text, one.references[0] if one.references else "", "test")
            for index, one in enumerate(file.questions)
        ]
        plain = self._plan(spread(asked, settings.num_file_answers))
        crossed = [(one, scene) for scene in range(len(file.scenes)) for one in asked]
        under = [
            replace(planned, id=f"{planned.id}/pos-{scene}", scene=file.scenes[scene])
            for one, scene in spread(crossed, settings.num_file_answers)
            for planned in self._plan([one])
        ]
        report: dict[str, Any] = {
            "file": file.name,
            "num_questions": len(file.questions),
            "num_scenes": len(file.scenes),
            "role": file.role,
            "eval_prompt": file.eval_prompt is not None,
        }
        for context, planned in (("one_turn", plain), ("with_scene", under)):
            # File ids are their own, apart from the built-in questions'.
            named = [replace(one, id=f"file/{one.id}") for one in planned]
            examples = self._dense("questions", named)
            if examples:
                report[context] = self._beside(f"questions/{context}", examples)
        references = self._references(file)
        return report if references is None else report | {"references": references}

    def _beside(self, part: str, examples: Sequence[Example]) -> dict[str, Any]:
        """KL on the dense answers, and free running, for questions without baselines."""
        held_out = HeldOut(self.pair.model, examples)
        return _distance(held_out.divergence(self.pair.sculpted)) | {
            "free_running": self._free_running(part, examples, held_out, count=len(examples))
        }

    def _references(self, file: QuestionFile) -> dict[str, Any] | None:
        """NLL a token of the file's own answers, under both models."""
        tokenizer, pair = self.pair.base.tokenizer, self.pair
        candidates = [
            Candidate(
                tuple(render_chat(tokenizer, self.subject.system_prompt, [ChatMessage("user", one.text)])),
                tuple(tokenizer(reference, add_special_tokens=False)["input_ids"]),
            )
            for one in spread(file.questions, self.settings.num_file_answers)
            for reference in one.references
        ]
        if not candidates:
            return None
        lengths = np.array([len(one.answer) for one in candidates])
        dense, sculpted = (
            -score(pair.model, candidates, forward).log_likelihood.numpy() / lengths
            for forward in (pair.dense, pair.sculpted)
        )
        return {
            "num_answers": len(candidates),
            "dense_nll": mean_interval(dense).as_dict(),
            "sculpted_nll": mean_interval(sculpted).as_dict(),
            "difference": mean_interval(sculpted - dense).as_dict(),
        }

    # conversations

    def conversations(self) -> dict[str, Any]:
        """Scripted conversations that each model holds with itself, turn by turn."""
        settings, pair = self.settings, self.pair
        scripts = spread(conversations.load_scripts(), settings.num_conversations)
        num_turns = min(settings.turns, max(len(one.turns) for one in scripts))
        held: dict[str, list[list[Example]]] = {}
        for name in ("dense", "sculpted"):
            held[name] = conversations.converse(
                pair.base,
                pair.teacher(sculpted=name == "sculpted"),
                self.subject.system_prompt,
                scripts,
                num_turns=num_turns,
                max_tokens=settings.answer_tokens,
                context_length=pair.engine.max_model_len,
                seed=settings.seed,
                on_turn=_Count(self.on_progress, f"conversations: {name}", num_turns),
            )
            for conversation in held[name]:
                self.spoken += _spoken_turns(name, conversation)
        turns, distances = [], []
        for turn in range(num_turns):
            self.on_progress("conversations: measuring", turn, num_turns)
            found = self._turn(held, turn)
            if found is None:
                break
            turns.append(found[0])
            distances.append(found[1])
        return {
            "num_conversations": len(scripts),
            "num_turns": len(turns),
            "kl": _over_conversations(distances),
            "turns": turns,
        }

    def _turn(
        self, held: Mapping[str, Sequence[Sequence[Example]]], turn: int
    ) -> tuple[dict[str, Any], dict[str, float]] | None:
        """The figures of one turn, and each conversation's KL in it; None where nobody got so far."""
        answers = {name: conversations.at_turn(some, turn) for name, some in held.items()}
        if not all(answers.values()):
            return None
        held_out = HeldOut(self.pair.model, answers["dense"])
        distance = held_out.divergence(self.pair.sculpted)
        ours = HeldOut(self.pair.model, answers["sculpted"])
        figures = _distance(distance) | {
            "turn": turn + 1,
            "dense_nll_of_dense": mean_interval(held_out.dense_nll().double().numpy()).as_dict(),
            "dense_nll_of_sculpted": mean_interval(ours.dense_nll().double().numpy()).as_dict(),
            **{name: conversations.free_figures(some, turn) for name, some in held.items()},
        }
        return figures, {one.topic: float(value) for one, value in zip(answers["dense"], distance.kl, strict=True)}


class _Count:
    """Tells progress how often it was called."""

    def __init__(self, on_progress: OnProgress, what: str, total: int) -> None:
        self._on_progress = on_progress
        self._what = what
        self._total = total
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        self._on_progress(self._what, min(self._done, self._total), self._total)


def _distance(found: Divergence) -> dict[str, Any]:
    return {
        "num_questions": len(found.kl),
        "kl": mean_interval(found.kl.double().numpy()).as_dict(),
        "top1_agreement": mean_interval(found.top1.double().numpy()).as_dict(),
    }


def _over_conversations(turns: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Mean KL over turns; its interval resamples conversations, for the turns of one are no separate draws."""
    names = sorted({name for turn in turns for name in turn})
    if not names:
        return None
    means = [float(np.mean([turn[name] for turn in turns if name in turn])) for name in names]
    return mean_interval(np.array(means)).as_dict()


def _again(example: Example, seed: int) -> Planned:
    """The same question in the same context, to be answered by the sub-network."""
    question = Instruction(example.question_id, example.topic, example.question, "", example.split)
    return Planned(example.id, question, example.sensitivity or 0.0, example.scene, 0, seed)


def _unended(example: Example) -> tuple[int, ...]:
    """The answer without its end token."""
    return example.answer[:-1] if example.ended else example.answer


def _spoken(part: str, model: str, example: Example, history: tuple[str, ...] = ()) -> Spoken:
    return Spoken(
        part, example.id, model, example.scene, history, example.question, example.answer_text.strip(), example.ended
    )


def _spoken_turns(model: str, conversation: Sequence[Example]) -> list[Spoken]:
    said: list[str] = []
    spoken = []
    for one in conversation:
        spoken.append(_spoken("conversations", model, one, tuple(said)))
        said += [one.question, one.answer_text.strip()]
    return spoken
