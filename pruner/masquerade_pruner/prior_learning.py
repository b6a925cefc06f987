"""Learning a base's prior from the reference personas together.

Much of a mask is shared by all personas of a base, and so is much of what recovery trains on top of it. Starting from
what they share saves most of the steps, and leaves masks that overlap, so that a cast's union stays small.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from masquerade_engine.base import Base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_masks import SettingError, round_kept
from masquerade_pruner import synthesis
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import activation_importance, averaged_ranks, fisher_importance
from masquerade_pruner.instructions import InstructionSet, load_instructions, spread
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import METHOD, MaskLearner, top_k_mask
from masquerade_pruner.presets import MAX_SPARSITY
from masquerade_pruner.prior import Prior, SharedRecovery, read_prior, write_prior
from masquerade_pruner.progress import Progress, Reporter
from masquerade_pruner.recovery import Recovery, RecoverySettings, recover
from masquerade_pruner.sensitivity import Reference, load_references
from masquerade_pruner.teacher import SelfTeacher
from masquerade_pruner.tree import Forward, masked
from masquerade_pruner.workdir import Workdir

_STREAMS = 64  # answers written at once
_SAVE_EVERY = 10  # steps between two checkpoints
SHARED: tuple[Recovery, ...] = ("none", "vectors", "lora")  # own weights are of one persona, and as large as the base's
_OF_ANSWERS = (  # the settings that answers depend on
    "steps",
    "branches_per_step",
    "answer_tokens",
    "context_share",
    "num_validation",
    "num_validation_personas",
)


@dataclass(frozen=True, slots=True)
class PriorSettings:
    """What a prior is learned from, and for how long; the numbers travel in its file."""

    sparsities: tuple[float, ...] = (0.25, 0.5)
    steps: int = 240  # for each sparsity; every branch is seen once
    branches_per_step: int = 16
    learning_rate: float = 0.012
    answer_tokens: int = 64
    context_share: float = 0.25
    num_importance: int = 8  # examples of every reference that the first scores are taken from
    num_validation: int = 16  # questions, asked of each of these
    num_validation_personas: int = 4
    validate_every: int = 60
    recovery: Recovery = "none"  # of this kind, on top of the prior's masks; `none` learns scores
    blend: float = 0.0  # of a further round's start: the share that the next sparser scores have in it

    def __post_init__(self) -> None:
        """Raises `SettingError`."""
        if not self.sparsities or not all(0 < one <= MAX_SPARSITY for one in self.sparsities):
            raise SettingError("sparsity", f"must be above 0 and at most {MAX_SPARSITY}")
        if not 0.0 <= self.blend <= 1.0:
            raise SettingError("blend", f"must be between 0 and 1, not {self.blend:g}")
        if self.recovery not in SHARED:
            raise SettingError("recovery", f"{self.recovery!r} is not one of {', '.join(SHARED)}")


def learn_prior(
    base: Base,
    workdir: Path,
    out: Path,
    settings: PriorSettings,
    *,
    start: Prior | None = None,
    instructions: InstructionSet | None = None,
    references: Sequence[Reference] | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Prior:
    """Learn the scores of every sparsity, or a recovery on top of each one's mask, and write the prior to `out`.

    Scores start from those of `start`, whose other sparsities are kept, and see other answers than it did; without it
    the first ones start from importances, and each of the others from the one before. A recovery is on top of the masks
    of `start`, and starts from its recovery of that kind. The same settings in the same `workdir` go on where they
    were. Raises `SettingError` for a recovery without `start`, and `SculptCancelled`.
    """
    if start is None and settings.recovery != "none":
        raise SettingError("recovery", "is learned on top of the masks of a prior that there is: learn that first")
    numbers = [round_kept(base.shape.intermediate_size, sparsity) for sparsity in settings.sparsities]
    shares = {"answer": 0.15} | {_stage(kept): 0.85 / len(numbers) for kept in numbers}
    reporter = Reporter(progress, cancelled, lambda stage, seconds: None, shares)
    asked = load_instructions() if instructions is None else instructions
    learning = _PriorLearning(base, workdir, settings, (asked, references or load_references()), reporter, start)
    examples = learning.answer()
    if start is not None and settings.recovery != "none":
        learned = start
        for kept in numbers:
            shared = learning.recover(kept, examples, start)
            learned = replace(learned, recoveries={**learned.recoveries, (kept, settings.recovery): shared})
    else:
        learned = Prior({}) if start is None else replace(start, rounds=start.rounds + 1)
        before: torch.Tensor | None = None
        for kept in numbers:
            before = learning.learn(kept, examples, before if start is None else _further(start, kept, settings.blend))
            learned = replace(learned, scores={**learned.scores, kept: before})
    # Now and not after each: an interrupted round must find the same start again.
    write_prior(out, base, learned, json.dumps(asdict(settings)))
    return read_prior(out, base)


def _further(start: Prior, kept: int, blend: float) -> torch.Tensor:
    """Scores that a further round starts from, `[layers, intermediate]`.

    Where a round's steps no longer improve a mask, some way towards the sparser scores is as good a mask that they do.
    """
    sparser = [number for number in start.scores if number < kept]
    if not blend or not sparser:
        return start.at(kept)
    return torch.lerp(averaged_ranks(start.at(kept)), averaged_ranks(start.scores[max(sparser)]), blend)


class _PriorLearning:
    """Answers of all reference personas, and scores learned from one persona's batch after another's."""

    def __init__(
        self,
        base: Base,
        workdir: Path,
        settings: PriorSettings,
        pool: tuple[InstructionSet, Sequence[Reference]],
        reporter: Reporter,
        start: Prior | None,
    ) -> None:
        self._base = base
        self._round = 0 if start is None else start.rounds
        self._settings = settings
        self._reporter = reporter
        self._instructions, self._references = pool
        numbers = asdict(settings)
        identity = {
            "base": base.fingerprint,
            "dtype": str(base.dtype),
            "instructions": self._instructions.digest,
            "personas": [reference.system_prompt for reference in self._references],
            "round": self._round,
        }
        self._answers = Workdir(workdir / "answers", identity | {name: numbers[name] for name in _OF_ANSWERS})
        self._learning = Workdir(workdir / "scores", identity | numbers | {"method": METHOD})

    def answer(self) -> dict[str, list[Example]]:
        """Training examples of every reference, and validation examples of a few under `validation/<id>`."""
        settings = self._settings
        each = -(-settings.steps * settings.branches_per_step // len(self._references))
        held_out = spread(self._instructions.validation, settings.num_validation)
        plans: dict[str, tuple[Reference, list[synthesis.Planned]]] = {}
        for number, reference in enumerate(self._references):
            plans[reference.id] = reference, self._plan(number, each)
            if number < settings.num_validation_personas:
                asked = synthesis.plan_held_out([(one, 0.0) for one in held_out], number)
                plans[f"validation-{reference.id}"] = reference, asked
        total = sum(len(planned) for _, planned in plans.values())
        with self._reporter.stage("answer"):
            return self._answered(plans, total)

    def _plan(self, number: int, count: int) -> list[synthesis.Planned]:
        """Each reference is asked its own mix of the training questions, again and again until there are enough."""
        questions = [(one, 0.0) for one in self._instructions.train]
        seed = self._round * len(self._references) + number
        planned = synthesis.plan_training(questions, -(-count // len(questions)), self._settings.context_share, seed)
        return random.Random(f"prior {seed}").sample(planned, count)

    def _answered(
        self, plans: Mapping[str, tuple[Reference, Sequence[synthesis.Planned]]], total: int
    ) -> dict[str, list[Example]]:
        examples: dict[str, list[Example]] = {}
        done = 0
        engine: Engine | None = None
        try:
            for name, (reference, planned) in plans.items():
                if not (self._answers.path / f"{name}.jsonl").is_file():
                    engine = engine or Engine(self._base, EngineSettings(max_num_seqs=_STREAMS, max_queue=1_000_000))
                    self._answers.write_examples(name, self._ask(engine, reference, planned, done, total))
                examples[name] = self._answers.read_examples(name)
                done += len(planned)
        finally:
            if engine is not None:
                engine.close()
        return examples

    def _ask(
        self, engine: Engine, reference: Reference, planned: Sequence[synthesis.Planned], done: int, total: int
    ) -> list[Example]:
        teacher = SelfTeacher(engine, PersonaFunction(f"base:{self._base.fingerprint}", "prior", None))
        found: list[Example] = []

        def count(example: Example) -> None:
            found.append(example)
            self._reporter.at(done + len(found), total, message=f"answering as {reference.name}")

        for part in synthesis.needs_turns(planned):
            synthesis.answer(
                part,
                base=self._base,
                system_prompt=reference.system_prompt,
                teacher=teacher,
                max_tokens=self._settings.answer_tokens,
                earlier=list(found),
                on_example=count,
            )
        return found

    def learn(self, kept: int, examples: Mapping[str, Sequence[Example]], start: torch.Tensor | None) -> torch.Tensor:
        """Scores for one number of kept neurons, `[layers, intermediate]`: those whose mask was best on validation."""
        settings, model = self._settings, build_learner(self._base)
        pools = [examples[reference.id] for reference in self._references]
        with self._reporter.stage(_stage(kept)):
            learner = MaskLearner(
                model,
                self._first_scores(model, pools) if start is None else averaged_ranks(start),
                kept,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
            )
            divergence = self._divergence(model, examples)
            turns = _Turns(pools, settings.branches_per_step)
            return self._steps(f"kept-{kept}", learner, turns, lambda: divergence(masked(model, learner.mask())))

    def recover(self, kept: int, examples: Mapping[str, Sequence[Example]], start: Prior) -> SharedRecovery:
        """A recovery of the scores' mask: what was best on validation."""
        settings, model = self._settings, build_learner(self._base)
        pools = [examples[reference.id] for reference in self._references]
        turns = _Turns(pools, settings.branches_per_step)
        numbers = RecoverySettings(
            steps=settings.steps,
            validate_every=settings.validate_every,
            num_means=settings.num_importance * len(pools),
        )
        identity = self._learning.read_json("spec") | {"prior": start.digest(kept, settings.recovery)}
        with self._reporter.stage(_stage(kept)):
            recovered = recover(
                model,
                top_k_mask(start.at(kept), kept),
                settings.recovery,
                [one for pool in pools for one in pool[: settings.num_importance]],
                self._divergence(model, examples),
                numbers,
                own_dtype=self._base.dtype,
                prior=start,
                order=turns,
                workdir=Workdir(self._learning.path / f"{settings.recovery}-{kept}", identity),
                on_step=lambda step, loss: self._reporter.at(
                    step, settings.steps, loss=loss, message=f"recovering with {settings.recovery}"
                ),
            )
        return SharedRecovery(recovered.change.kept, recovered.change.tensors)

    def _divergence(
        self, model: torch.nn.Module, examples: Mapping[str, Sequence[Example]]
    ) -> Callable[[Forward], float]:
        """KL to the base in nats a token, the mean over the validation personas."""
        held_out = [
            HeldOut(model, asked, between=self._reporter.check)
            for name, asked in examples.items()
            if name.startswith("validation-")
        ]

        def divergence(changed: Forward) -> float:
            means = [float(one.divergence(changed).kl.mean()) for one in held_out]
            return round(sum(means) / len(means), 5)

        return divergence

    def _first_scores(self, model: torch.nn.Module, pools: Sequence[Sequence[Example]]) -> torch.Tensor:
        saved = self._learning.read_tensors("importance")
        if saved is None:
            wanda, fisher = [], []
            for number, pool in enumerate(pools):
                few = pool[: self._settings.num_importance]
                wanda.append(activation_importance(model, few).square())
                fisher.append(fisher_importance(model, few, between=self._reporter.check))
                self._reporter.at(0, self._settings.steps, message=f"importance, persona {number + 1} of {len(pools)}")
            saved = {"wanda": torch.stack(wanda).mean(0).sqrt(), "fisher": torch.stack(fisher).mean(0)}
            self._learning.write_tensors("importance", saved)
        return averaged_ranks(saved["wanda"], saved["fisher"])

    def _steps(self, name: str, learner: MaskLearner, turns: _Turns, divergence: Callable[[], float]) -> torch.Tensor:
        settings = self._settings
        state, history = self._learning.read_tensors(name), self._learning.read_json(name)
        if state is None or history is None or int(state["step"]) != history["step"]:
            state, history = {"best": learner.averaged()}, {"step": 0, "kl": [[0, divergence()]]}
        else:
            learner.restore(state)
        best = state["best"]
        while learner.step_number < settings.steps:
            number = learner.step_number
            loss = learner.step(turns.batch(number))
            number += 1
            if number % settings.validate_every == 0 or number == settings.steps:
                kl = divergence()
                if kl < min(value for _, value in history["kl"]):
                    best = learner.averaged()
                history["kl"].append([number, kl])
            if number % _SAVE_EVERY == 0 or number == settings.steps:
                history["step"] = number
                self._learning.write_tensors(name, {**learner.state(), "best": best})
                self._learning.write_json(name, history)
            self._reporter.at(number, settings.steps, loss=loss, message=f"{name}, KL {history['kl'][-1][1]:.3f}")
        return best


def _stage(kept: int) -> str:
    return f"learn, {kept} kept"


class _Turns:
    """Batches of one persona's next examples; the personas take turns."""

    def __init__(self, pools: Sequence[Sequence[Example]], size: int) -> None:
        self._pools = pools
        self._size = size

    def batch(self, step: int) -> list[Example]:
        """The examples of step number `step`."""
        turn, persona = divmod(step, len(self._pools))
        pool = self._pools[persona]
        return [pool[(turn * self._size + place) % len(pool)] for place in range(self._size)]
