"""The sculptor: select, answer, learn, recover, evaluate, each stage checkpointed; publishing is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from masquerade_engine.base import Base
from masquerade_engine.device_memory import give_memory_back
from masquerade_engine.engine import Engine
from masquerade_engine.kv_cache import KVGeometry, slots_are_lazy
from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_masks import Attached, InsufficientMemory, Mask, SettingError, SubNetwork, round_kept
from masquerade_pruner import evaluation, synthesis
from masquerade_pruner.answering import Answered, Answering, Selected
from masquerade_pruner.changes import Change
from masquerade_pruner.epochs import Epochs
from masquerade_pruner.estimate import describe, plan_for
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import Fluctuation, averaged_ranks, baseline_scores, fisher_importance, fluctuation
from masquerade_pruner.instructions import Instruction, InstructionSet, load_instructions, spread
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import METHOD, MaskLearner, reach, top_k_mask
from masquerade_pruner.plan import Execution, Plan
from masquerade_pruner.presets import OF_LEARNING, SculptSettings, SculptSpec, shortened
from masquerade_pruner.prior import prior_of
from masquerade_pruner.progress import RECOVERY_STEPS, STAGES, Progress, Reporter
from masquerade_pruner.recovery import Recovered, Recovery, recover
from masquerade_pruner.rewriting import ChatModel, RewritingTeacher
from masquerade_pruner.sensitivity import persona_units, reference_pass, select
from masquerade_pruner.teacher import SelfTeacher, Teacher
from masquerade_pruner.tree import Forward
from masquerade_pruner.workdir import Workdir

SAVE_STEPS_EVERY = 10  # learning steps between two checkpoints


@dataclass(frozen=True, slots=True)
class SculptResult:
    """All that publishing needs."""

    subnetwork: SubNetwork  # with gains, biases and weights, where recovery made any
    recovery: Recovery  # what the sub-network has; `none` as well where nothing was better than the mask by itself
    settings: dict[str, Any]
    system_prompt: str
    prompt_sha256: str
    report: dict[str, Any]
    examples_path: Path  # JSONL: the training examples with their sensitivity
    seconds: dict[str, float]  # by stage


@dataclass(frozen=True, slots=True)
class _Learned:
    mask: torch.Tensor  # [layers, intermediate]
    baselines: dict[str, torch.Tensor]  # of the same size, from the same examples
    on_validation: dict[str, float]  # KL, or NLL of a remote teacher's answers, of each baseline
    mean_activations: torch.Tensor  # [layers, intermediate], of the base on the same examples
    history: dict[str, Any]

    @property
    def unrecovered(self) -> float:
        """The best mask's own figure on validation."""
        figures: list[tuple[int, float]] = self.history.get("validation_kl") or self.history["validation_nll"]
        return min(figure for _, figure in figures)


def sculpt(
    spec: SculptSpec,
    base: Base,
    workdir: Path,
    *,
    cache_dir: Path,
    answers_dir: Path | None = None,
    teacher: ChatModel | None = None,
    cast: Sequence[Mask] = (),
    execution: Execution | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> SculptResult:
    """Learn the sub-network of `base` that the persona needs.

    `workdir` holds the stages' checkpoints: the same spec in the same directory goes on where it was. `cache_dir` holds
    what is computed once per base. Masks of one persona at several sparsities may share an `answers_dir`. A spec with
    `teacher="remote"` is answered by `teacher`, the operator's. Towards the neurons that the masks of its `cast` keep,
    this one is pulled. `execution` says how it may run; by default the fastest way that fits the device's memory is
    taken.
    Raises `InsufficientMemory` before anything is loaded, `SculptCancelled`, `TeacherError` where the teacher fails or
    more than half of its answers are unusable, and `SettingError` for an unusable instruction set or a remote teacher
    that there is not.
    """
    directories = (answers_dir or workdir / "answers", workdir / "mask", workdir / "recovery")
    run = _Sculptor(spec, base, directories, cache_dir, execution or Execution(), teacher, progress, cancelled)
    with run.workshop():
        selected = run.select()
        answered = run.answer(selected)
        learned = run.learn(answered, cast)
        recovered = run.recover(answered, learned)
        report = run.evaluate(answered, learned, recovered)
    return run.result(recovered, report)


def answered(
    spec: SculptSpec,
    base: Base,
    workdir: Path,
    *,
    cache_dir: Path,
    teacher: ChatModel | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Answered:
    """The first two stages of `sculpt` by themselves, which a sculpt in the same directory need not do again.

    Raises as `sculpt` does.
    """
    directories = (workdir / "answers", workdir / "mask", workdir / "recovery")
    run = _Sculptor(spec, base, directories, cache_dir, Execution(), teacher, progress, lambda: False)
    with run.workshop():
        return run.answer(run.select())


class _Sculptor:
    """One run: its spec, its checkpoints, and the base in the two forms that it needs."""

    def __init__(
        self,
        spec: SculptSpec,
        base: Base,
        directories: tuple[Path, Path, Path],  # answers, mask, recovery
        cache_dir: Path,
        execution: Execution,
        teacher: ChatModel | None,
        progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self.spec = spec
        self.base = base
        self.remote = _remote(spec, teacher)
        # What validation chooses by. A remote teacher gives no distribution to measure a divergence from.
        self.measure: Literal["kl", "nll"] = "kl" if self.remote is None else "nll"
        self.cache_dir = cache_dir
        self.instructions: InstructionSet = load_instructions(spec.instructions)
        self.settings: SculptSettings = shortened(spec.settings, len(self.instructions.train))
        self.kept = round_kept(base.shape.intermediate_size, spec.sparsity)
        self.system_prompt = persona_system_prompt(spec.name, spec.text)
        self.metadata = spec.metadata(self.instructions.digest, self.settings)
        self.prior = prior_of(base, cache_dir) if self.settings.start == "prior" else None
        digests = [
            None if self.prior is None else self.prior.digest(self.kept, kind) for kind in ("none", spec.recovery)
        ]
        identity = {"base": base.fingerprint, "dtype": str(base.dtype), "system_prompt": self.system_prompt}
        if self.remote is not None:
            self.metadata["teacher_model"] = self.remote.name
            identity["teacher_sha256"] = self.remote.digest
        # A mask does not depend on the recovery after it, nor answers on how a mask is learned from them.
        of_mask = {key: value for key, value in self.metadata.items() if key != "recovery"}
        of_answers = {key: value for key, value in of_mask.items() if key not in OF_LEARNING}
        self.answers = Workdir(directories[0], {**identity, **of_answers})
        self.learning = Workdir(directories[1], {**identity, **of_mask, "method": METHOD, "prior": digests[0]})
        self.recovering = Workdir(directories[2], {**identity, **self.metadata, "method": METHOD, "prior": digests[1]})
        self.plan = self._planned(execution)
        shares = {**STAGES, "recover": STAGES["recover"] * self.settings.recovery.steps / RECOVERY_STEPS}
        if spec.recovery == "none":
            del shares["recover"]
        self.reporter = Reporter(progress, cancelled, self._add_seconds, shares)
        self.answering = Answering(
            base,
            self.system_prompt,
            self.answering_teacher,
            self.settings,
            spec.seed,
            self.answers,
            self.reporter,
        )
        self._engine: Engine | None = None

    def _planned(self, execution: Execution) -> Plan:
        """The plan that this directory's steps ran by, where it still fits, else the best one now."""
        job = describe(self.spec, self.base, self.settings, self.instructions)
        earlier = self.learning.read_json("plan")
        if earlier is not None:
            try:
                return plan_for(job, self.base, Execution(**earlier))
            except InsufficientMemory:  # other programs hold more than they did then
                pass
        plan = plan_for(job, self.base, execution)
        self.learning.write_json("plan", plan.execution)
        return plan

    def _add_seconds(self, stage: str, seconds: float) -> None:
        directories = {"select": self.answers, "answer": self.answers, "learn": self.learning}
        directories.get(stage, self.recovering).add_seconds(stage, seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, over restarts."""
        return self.answers.seconds() | self.learning.seconds() | self.recovering.seconds()

    @contextmanager
    def workshop(self) -> Iterator[None]:
        """Close the engine, where a stage opened it, whatever happens."""
        try:
            yield
        finally:
            self.release_engine()

    def release_engine(self) -> None:
        """Give the engine's weights and KV cache back; the next teacher opens another."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            give_memory_back(self.base.device)

    def release_model(self) -> None:
        """Give the learner's weights back; who needs them next loads them again.

        Whoever still holds the model, as a recovered change does, holds a shell of it.
        """
        model = self.__dict__.pop("model", None)
        if model is not None:
            model.to("meta")

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base as learning runs it."""
        return build_learner(self.base)

    def teacher(self, subnetwork: SubNetwork | None = None) -> SelfTeacher:
        """The base, or one of its sub-networks, behind the engine."""
        if self._engine is None:
            if not self.plan.keeps_learner:
                self.release_model()
            give_memory_back(self.base.device)  # what the stages before have freed
            self._engine = Engine(self.base, self._engine_settings())
        digest = f"base:{self.base.fingerprint}" if subnetwork is None else subnetwork.digest
        return SelfTeacher(self._engine, PersonaFunction(digest, "sculpt", subnetwork))

    def _engine_settings(self) -> EngineSettings:
        settings = EngineSettings(max_num_seqs=self.plan.streams, max_queue=1_000_000)
        if slots_are_lazy(self.base.device):
            return settings
        # Slots are reserved whole: no longer than the longest chat of the sculpt.
        length = min(self.plan.slot_tokens, self.base.context_length)
        num_bytes = self.plan.streams * length * KVGeometry.of(self.base.config, self.base.dtype).bytes_per_token
        return replace(settings, max_model_len=length, kv_cache_bytes=num_bytes)

    def answering_teacher(self) -> Teacher:
        """Who writes the answers that are learned from."""
        if self.remote is None:
            return self.teacher()
        spec = self.spec
        return RewritingTeacher(self.remote, self.base, name=spec.name, text=spec.text, between=self.reporter.check)

    # 1. select

    def select(self) -> Selected:
        """The training questions that bring the persona out, and the held-out ones with their scores."""
        settings, sets = self.settings, self.instructions
        held_out = {
            "validation": spread(sets.validation, settings.num_validation),
            "test": spread(sets.test, settings.num_test),
        }
        scores = self.answers.read_json("sensitivity")
        if scores is None:
            with self.reporter.stage("select"):
                self.reporter.at(0, 1, message=self.plan.sentence)
                scores = self._score([*sets.train, *held_out["validation"], *held_out["test"]])
                self.answers.write_json("sensitivity", scores)
        train = select(
            [(one, scores[one.id]) for one in sets.train],
            keep_fraction=settings.keep_fraction,
            topic_cap=settings.topic_cap,
        )
        return Selected(train, *([(one, scores[one.id]) for one in held_out[name]] for name in held_out))

    def _score(self, questions: Sequence[Instruction]) -> dict[str, float]:
        references = reference_pass(
            self.base,
            lambda: self.model,
            self.instructions,
            self.cache_dir,
            on_progress=lambda done, total: self.reporter.at(done, total, message="reference personas, once per base"),
        )
        units = persona_units(
            self.base,
            self.model,
            self.system_prompt,
            questions,
            on_progress=lambda done, total: self.reporter.at(done, total, message="scoring questions"),
        )
        return {one.id: references.sensitivity(one.id, unit) for one, unit in zip(questions, units, strict=True)}

    # 2. answer

    def answer(self, selected: Selected) -> Answered:
        """Every question answered in the persona's voice by the teacher."""
        return self.answering.run(selected)

    # 3. learn

    def learn(self, answered: Answered, cast: Sequence[Mask] = ()) -> _Learned:
        """Straight-through steps from the prior's scores; the mask that is best on validation is kept."""
        saved = self.learning.read_tensors("learned")
        history = self.learning.read_json("history")
        if saved is None or history is None:
            self.release_engine()
            with self.reporter.stage("learn"):
                self.reporter.at(0, self.settings.steps, message=self.plan.sentence)
                statistics = self._statistics(answered)
                rivals = baseline_scores(self.model, statistics)
                held_out = HeldOut(self.model, answered.validation, between=self.reporter.check)
                start, pull = self._first_scores(answered, rivals), self._pull(cast)
                best, history = self._learn_scores(answered, rivals, held_out, (start, pull))
                saved = {"best": best, **rivals, "mean_activations": statistics.mean}
                self.learning.write_tensors("learned", saved)
                self.learning.write_json("history", history)
        on_validation = history[f"baseline_{self.measure}"]
        baselines = {name: top_k_mask(saved[name], self.kept) for name in on_validation}
        return _Learned(saved["best"], baselines, on_validation, saved["mean_activations"], history)

    def _statistics(self, answered: Answered) -> Fluctuation:
        saved = self.learning.read_tensors("activations")
        if saved is None:
            self.reporter.at(0, self.settings.steps, message="activations of the base")
            found = fluctuation(self.model, answered.train[: self.settings.num_importance])
            saved = {"mean": found.mean, "variance": found.variance}
            self.learning.write_tensors("activations", saved)
        return Fluctuation(saved["mean"], saved["variance"])

    def _learn_scores(
        self,
        answered: Answered,
        rivals: dict[str, torch.Tensor],  # scores of the baselines
        held_out: HeldOut,
        scores: tuple[torch.Tensor, torch.Tensor],  # the first ones, and what pulls on them
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        settings = self.settings
        learner = MaskLearner(
            self.model,
            scores[0],
            self.kept,
            steps=settings.steps,
            learning_rate=settings.rate(from_prior=self.prior is not None),
            loss=settings.loss,
            question_share=settings.question_share,
            dropped_alone=self.prior is not None,
            pull=scores[1],
            micro_batch=self.plan.micro_batch,
            checkpointing=self.plan.checkpointing,
        )
        validation = f"validation_{self.measure}"
        history = self.learning.read_json("learning")
        state = self.learning.read_tensors("learning")
        if history is not None and state is not None and int(state["step"]) == history["step"]:
            best = state.pop("best")
            learner.restore(state)
        else:
            baselines = {
                name: self._on_validation(held_out, self._under(top_k_mask(rival, self.kept)))
                for name, rival in rivals.items()
            }
            best = learner.mask()
            history = {
                "step": 0,
                f"baseline_{self.measure}": baselines,
                validation: [[0, self._on_validation(held_out, self._under(best))]],
                "loss": [],
                "best_step": 0,
            }
        order = Epochs(answered.train, settings.branches_per_step, self.spec.seed)
        while learner.step_number < settings.steps:
            loss = learner.step(order.batch(learner.step_number))
            number = learner.step_number
            history["loss"].append(round(loss, 5))
            if number % settings.validate_every == 0 or number == settings.steps:
                mask = learner.mask()
                figure = self._on_validation(held_out, self._under(mask))
                if figure < min(value for _, value in history[validation]):
                    best, history["best_step"] = mask, number
                history[validation].append([number, figure])
            if number % SAVE_STEPS_EVERY == 0:
                history["step"] = number
                self.learning.write_tensors("learning", {**learner.state(), "best": best})
                self.learning.write_json("learning", history)
            self.reporter.at(number, settings.steps, loss=loss, message="learning the mask")
        history["step"] = learner.step_number
        give_memory_back(self.base.device)
        return best, history

    def _on_validation(self, held_out: HeldOut, changed: Forward) -> float:
        """What is chosen by, mean over validation: KL to the base, or NLL of a remote teacher's answers."""
        return _mean(held_out.divergence(changed).kl if self.measure == "kl" else held_out.nll(changed))

    def _under(self, mask: torch.Tensor) -> Forward:
        return Change.of_mask(self.model, mask).forward

    def _first_scores(self, answered: Answered, rivals: dict[str, torch.Tensor]) -> torch.Tensor:
        """The prior's, or where there is none the mean of two ranks, of activations and of gradients."""
        if self.prior is not None:
            return averaged_ranks(self.prior.at(self.kept))
        if self.settings.start == "prior":
            missing = "this base has no prior yet: `masquerade prior` learns one, which sculpts gain from"
            self.reporter.at(0, self.settings.steps, message=missing)
        saved = self.learning.read_tensors("fisher")
        if saved is None:
            gradients = fisher_importance(
                self.model,
                answered.train[: self.settings.num_importance],
                micro_batch=self.plan.micro_batch,
                checkpointing=self.plan.checkpointing,
                between=self.reporter.check,
            )
            saved = {"fisher": gradients}
            self.learning.write_tensors("fisher", saved)
            give_memory_back(self.base.device)
        return averaged_ranks(rivals["wanda"], saved["fisher"])

    def _pull(self, cast: Sequence[Mask]) -> torch.Tensor:
        """Towards the cast as it was when learning began, `[layers, intermediate]`: a resumed job keeps its goal."""
        saved = self.learning.read_tensors("cast")
        if saved is None:
            saved = {"usage": torch.zeros(self.base.shape.num_layers, self.base.shape.intermediate_size)}
            for mask in cast:
                saved["usage"] += torch.from_numpy(mask.to_dense()).float() / len(cast)
            self.learning.write_tensors("cast", saved)
        rate = self.settings.rate(from_prior=self.prior is not None)
        return self.settings.cast_pull * reach(self.settings.steps, rate) * saved["usage"]

    # 4. recover

    def recover(self, answered: Answered, learned: _Learned) -> Recovered:
        """What the spec asks for on top of the frozen mask, best on validation; the mask by itself for `none`."""
        if self.spec.recovery == "none":
            return Recovered("none", Change.of_mask(self.model, learned.mask), {})
        settings = self.settings.recovery
        # Own weights are reconstructed before the first step.
        layers = self.base.shape.num_layers if self.spec.recovery == "full" else 0
        total = layers + settings.steps
        self.release_engine()
        with self.reporter.stage("recover"):
            held_out = HeldOut(self.model, answered.validation, between=self.reporter.check)
            recovered = recover(
                self.model,
                learned.mask,
                self.spec.recovery,
                answered.train,
                lambda changed: self._on_validation(held_out, changed),
                settings,
                unrecovered=learned.unrecovered,
                own_dtype=self.base.dtype,
                mean_activations=learned.mean_activations,
                prior=self.prior,
                loss=self.settings.loss,
                question_share=self.settings.question_share,
                seed=self.spec.seed,
                micro_batch=self.plan.micro_batch,
                checkpointing=self.plan.checkpointing,
                workdir=self.recovering,
                on_layer=lambda done: self.reporter.at(done, total, message="reconstructing layer by layer"),
                on_step=lambda step, loss: self.reporter.at(
                    layers + step, total, loss=loss, message=f"recovering with {self.spec.recovery}"
                ),
            )
        give_memory_back(self.base.device)
        return recovered

    # 5. evaluate

    def evaluate(self, answered: Answered, learned: _Learned, recovered: Recovered) -> dict[str, Any]:
        """The fidelity report, on the test split."""
        report = self.recovering.read_json("report")
        if report is None:
            with self.reporter.stage("evaluate"):
                report = self._report(answered, learned, recovered)
                self.recovering.write_json("report", report)
        return {**report, "seconds": self.seconds()}

    def _report(self, answered: Answered, learned: _Learned, recovered: Recovered) -> dict[str, Any]:
        strongest = evaluation.strongest_baseline(learned.on_validation)
        contexts, dense_nll = self._fidelity(answered, learned, recovered, strongest)
        self.reporter.at(3, 5, message="free-running answers")
        free = self._free_running(answered, recovered, dense_nll) if self.settings.num_free_running else None
        self.reporter.at(5, 5, message="done")
        return {
            "format": evaluation.REPORT_FORMAT,
            "persona": self.spec.persona_id,
            "sparsity": self.spec.sparsity,
            "kept": self.kept,
            "intermediate_size": self.base.shape.intermediate_size,
            **{name: self.metadata[name] for name in ("teacher", "teacher_model") if name in self.metadata},
            "synthesis": self.answering.tally.as_dict(),
            "measure": self.measure,
            "baselines": list(learned.baselines),
            "strongest_baseline": strongest,
            **contexts,
            **({} if free is None else {"free_running": evaluation.free_running(free)}),
            "learning": {**learned.history, "num_examples": len(answered.train)},
            "recovery": {"applied": recovered.kind, "bytes": recovered.num_bytes, **recovered.history},
        }

    def _fidelity(
        self, answered: Answered, learned: _Learned, recovered: Recovered, strongest: str
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """The comparison by kind of context, and the dense model's NLL of its own test answers.

        Nothing that is returned holds the model, which may have to go before the engine comes.
        """
        check = self.reporter.check
        compared = evaluation.fidelity if self.measure == "kl" else evaluation.likelihood
        ours = recovered.change.forward
        rivals = {strongest: self._under(learned.baselines[strongest])}
        one_turn = HeldOut(self.model, answered.test, between=check)
        self.reporter.at(1, 5, message="fidelity on test questions")
        contexts = {"one_turn": compared(one_turn, answered.test, ours, rivals, strongest)}
        self.reporter.at(2, 5, message="fidelity under scene lines")
        if answered.test_scenes:
            scenes = HeldOut(self.model, answered.test_scenes, between=check)
            contexts["with_scene"] = compared(scenes, answered.test_scenes, ours, rivals, strongest)
        return contexts, one_turn.dense_nll()

    def _free_running(
        self, answered: Answered, recovered: Recovered, dense_nll: torch.Tensor
    ) -> evaluation.FreeRunning:
        places = spread(range(len(answered.test)), self.settings.num_free_running)
        chosen = [answered.test[place] for place in places]
        planned = [
            synthesis.Planned(one.id, _instruction(one), one.sensitivity or 0.0, None, 0, seed=index)
            for index, one in enumerate(chosen)
        ]
        given = synthesis.answer(
            planned,
            base=self.base,
            system_prompt=self.system_prompt,
            teacher=self.teacher(self.subnetwork(recovered)),
            max_tokens=self.settings.answer_tokens,
            on_example=lambda _example: self.reporter.check(),
        )
        if not self.plan.keeps_learner:
            self.release_engine()
        by_id = {one.id: one for one in given}
        pairs = [
            (one, by_id[one.id], nll) for one, nll in zip(chosen, dense_nll[places], strict=True) if one.id in by_id
        ]
        sculpted = [other for _, other, _ in pairs]
        return evaluation.FreeRunning(
            reference=[one for one, _, _ in pairs],
            sculpted=sculpted,
            reference_nll=torch.stack([nll for _, _, nll in pairs]),
            sculpted_nll=HeldOut(self.model, sculpted, between=self.reporter.check).dense_nll(),
            writer="dense" if self.remote is None else "teacher",
        )

    def subnetwork(self, recovered: Recovered) -> SubNetwork:
        """The mask with its gains and biases as what is stored and served."""
        mask = Mask.from_kept_indices(recovered.change.kept.cpu().numpy(), self.base.shape.intermediate_size)
        gain, bias = (None if one is None else one.cpu().numpy() for one in (recovered.gain, recovered.bias))
        weights = self._attached(recovered)
        return SubNetwork(self.base.fingerprint, self.base.shape, mask, gain, bias, weights=weights)

    def _attached(self, recovered: Recovered) -> Attached | None:
        settings = self.settings.recovery
        if recovered.kind == "lora":
            return Attached("lora", _arrays(recovered.lora), settings.lora_alpha, settings.lora_rank)
        return Attached("full", _arrays(recovered.full)) if recovered.kind == "full" else None

    def result(self, recovered: Recovered, report: dict[str, Any]) -> SculptResult:
        """What publishing needs."""
        return SculptResult(
            subnetwork=self.subnetwork(recovered),
            recovery=recovered.kind,
            settings={**self.metadata, "plan": self.plan.metadata()},
            system_prompt=self.system_prompt,
            prompt_sha256=prompt_sha256(self.system_prompt),
            report=report,
            examples_path=self.answers.examples_path("examples"),
            seconds=self.seconds(),
        )


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """As arrays; bfloat16, which numpy has not, as its bits."""
    bits = {name: one.view(torch.uint16) if one.dtype == torch.bfloat16 else one for name, one in tensors.items()}
    return {name: one.cpu().numpy() for name, one in bits.items()}


def _remote(spec: SculptSpec, teacher: ChatModel | None) -> ChatModel | None:
    """The remote teacher where the spec asks for it."""
    if spec.teacher != "remote":
        return None
    if teacher is None:
        raise SettingError(
            "teacher", "'remote' is not configured here: set teacher_url and teacher_model, or use 'base'"
        )
    return teacher


def _instruction(example: Example) -> Instruction:
    return Instruction(example.question_id, example.topic, example.question, "", example.split)


def _mean(values: torch.Tensor) -> float:
    return round(float(values.mean()), 5)
