"""The prior of a base: scores learned once from the reference personas together, where every persona's learning starts.

Much of a mask is shared by all personas of a base. Starting from what they share saves most of the steps, and leaves
masks that overlap, so that a cast's union stays small.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from masquerade_engine.base import Base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_masks import MaskFormatError, SettingError, round_kept
from masquerade_pruner import synthesis
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import activation_importance, averaged_ranks, fisher_importance
from masquerade_pruner.instructions import InstructionSet, load_instructions, spread
from masquerade_pruner.mask_learning import METHOD, MaskLearner
from masquerade_pruner.presets import MAX_SPARSITY
from masquerade_pruner.progress import Progress, Reporter
from masquerade_pruner.sensitivity import Reference, load_references
from masquerade_pruner.teacher import SelfTeacher
from masquerade_pruner.tree import masked
from masquerade_pruner.workdir import Workdir

FORMAT = "masquerade.prior/1"
_STREAMS = 64  # answers written at once
_SAVE_EVERY = 10  # steps between two checkpoints
_OF_ANSWERS = (  # the settings that answers depend on
    "steps",
    "branches_per_step",
    "answer_tokens",
    "context_share",
    "num_validation",
    "num_validation_personas",
)


@dataclass(frozen=True, slots=True)
class Prior:
    """Scores by the number of neurons kept in a layer, fp32 `[layers, intermediate]` each."""

    scores: Mapping[int, torch.Tensor]
    rounds: int = 1  # of learning, each from the last one's scores

    def at(self, kept: int) -> torch.Tensor:
        """The scores learned for the nearest number of kept neurons."""
        return self.scores[min(self.scores, key=lambda known: (abs(known - kept), known))]


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

    def __post_init__(self) -> None:
        """Raises `SettingError`."""
        if not self.sparsities or not all(0 < one <= MAX_SPARSITY for one in self.sparsities):
            raise SettingError("sparsity", f"must be above 0 and at most {MAX_SPARSITY}")


def prior_of(base: Base, cache_dir: Path) -> Prior | None:
    """The prior learned on this machine, else the shipped one, else None. Raises `MaskFormatError` for a wrong file."""
    shipped = resources.files("masquerade_pruner") / "data" / f"prior-{base.fingerprint[:16]}.safetensors"
    for candidate in (prior_path(base, cache_dir), Path(str(shipped))):
        if candidate.is_file():
            return _read(candidate, base)
    return None


def prior_path(base: Base, cache_dir: Path) -> Path:
    """Where a prior that is learned here is kept."""
    return cache_dir / "priors" / f"{base.fingerprint}.safetensors"


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
    """Learn the scores of every sparsity and write them to `out`.

    They start from those of `start`, whose other sparsities are kept, and see other answers than it did; without it the
    first ones start from importances, and each of the others from the one before. The same settings in the same
    `workdir` go on where they were. Raises `SculptCancelled`.
    """
    numbers = [round_kept(base.shape.intermediate_size, sparsity) for sparsity in settings.sparsities]
    shares = {"answer": 0.15} | {_stage(kept): 0.85 / len(numbers) for kept in numbers}
    reporter = Reporter(progress, cancelled, lambda stage, seconds: None, shares)
    asked = load_instructions() if instructions is None else instructions
    learning = _PriorLearning(base, workdir, settings, (asked, references or load_references()), reporter, start)
    examples = learning.answer()
    learned = Prior({}, 1) if start is None else Prior(start.scores, start.rounds + 1)
    before: torch.Tensor | None = None
    for kept in numbers:
        before = learning.learn(kept, examples, before if start is None else start.at(kept))
        learned = replace(learned, scores={**learned.scores, kept: before})
    # Now and not after each: an interrupted round must find the same start again.
    _write(out, base, settings, learned)
    return _read(out, base)


def _write(path: Path, base: Base, settings: PriorSettings, prior: Prior) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    metadata = {
        "format": FORMAT,
        "base": base.fingerprint,
        "settings": json.dumps(asdict(settings)),  # of the last round
        "rounds": str(prior.rounds),
    }
    save_file({str(kept): one.contiguous() for kept, one in prior.scores.items()}, scratch, metadata)
    scratch.replace(path)


def _read(path: Path, base: Base) -> Prior:
    expected = (base.shape.num_layers, base.shape.intermediate_size)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("base") != base.fingerprint:
            raise MaskFormatError(f"{path.name} is not a prior of this base")
        scores = {int(name): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if not scores or any(one.shape != expected or not one.isfinite().all() for one in scores.values()):
        raise MaskFormatError(f"{path.name} does not hold finite scores of shape {list(expected)}")
    return Prior(scores, int(metadata.get("rounds", 1)))


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
        settings, model = self._settings, self._base.build_model()
        pools = [examples[reference.id] for reference in self._references]
        with self._reporter.stage(_stage(kept)):
            learner = MaskLearner(
                model,
                self._first_scores(model, pools) if start is None else averaged_ranks(start),
                kept,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
            )
            held_out = [
                HeldOut(model, asked, between=self._reporter.check)
                for name, asked in examples.items()
                if name.startswith("validation-")
            ]
            return self._steps(f"kept-{kept}", learner, pools, lambda: _divergence(model, held_out, learner.mask()))

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

    def _steps(
        self, name: str, learner: MaskLearner, pools: Sequence[Sequence[Example]], divergence: Callable[[], float]
    ) -> torch.Tensor:
        settings = self._settings
        state, history = self._learning.read_tensors(name), self._learning.read_json(name)
        if state is None or history is None or int(state["step"]) != history["step"]:
            state, history = {"best": learner.averaged()}, {"step": 0, "kl": [[0, divergence()]]}
        else:
            learner.restore(state)
        best = state["best"]
        while learner.step_number < settings.steps:
            number = learner.step_number
            loss = learner.step(_batch(pools, number, settings.branches_per_step))
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


def _batch(pools: Sequence[Sequence[Example]], step: int, size: int) -> list[Example]:
    """One persona's next examples; the personas take turns."""
    turn, persona = divmod(step, len(pools))
    pool = pools[persona]
    return [pool[(turn * size + place) % len(pool)] for place in range(size)]


def _divergence(model: torch.nn.Module, held_out: Sequence[HeldOut], mask: torch.Tensor) -> float:
    means = [float(one.divergence(masked(model, mask)).kl.mean()) for one in held_out]
    return round(sum(means) / len(means), 5)
