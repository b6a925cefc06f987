"""What each part of mask learning is worth, one part changed at a time.

    python benchmarks/ablations.py --quick                           # minutes: small sculpts, to try it
    python benchmarks/ablations.py examples/personas/*.txt           # every study
    python benchmarks/ablations.py pip --studies loss estimator      # some of them
    python benchmarks/ablations.py pip --start importance            # without the prior, where learning has most to do

Personas are text files or ids of ready personas. Each is sculpted once (or its sculpt is found in the work directory,
which is that of fidelity.py) for its examples; every variant then learns a mask anew in the same number of steps of as
many branches, keeps what is best on validation, and is measured on the test split. The *reference* learns from KL and
the sculpt's examples, as `MaskLearner` does, from the base's prior, or from Wanda's and Fisher's averaged ranks where
it has none or with `--start importance`. A variant that several studies need is learned once. Each is kept in the work
directory and checkpointed as it learns: an interrupted run goes on, and runs of different studies may share a persona.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from estimators import Estimator, EstimatorLearner, Optimizer
from machine import machine
from sculpts import material, personas, sculpted, usual_workdir
from tables import header, percent, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_engine.threads import available_cores
from masquerade_pruner import SculptResult, SculptSpec
from masquerade_pruner.bootstrap import Values, gap_closed
from masquerade_pruner.epochs import Epochs
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import activation_importance, averaged_ranks, fisher_importance
from masquerade_pruner.instructions import Instruction, load_instructions
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import METHOD, Loss
from masquerade_pruner.presets import PRESETS
from masquerade_pruner.presets import Start as SculptStart
from masquerade_pruner.prior import prior_of
from masquerade_pruner.sensitivity import persona_units
from masquerade_pruner.synthesis import answer, plan_training
from masquerade_pruner.teacher import SelfTeacher
from masquerade_pruner.tree import masked
from masquerade_pruner.workdir import Workdir

# What the run starts from, the prior or both importances; or what it says.
Start = Literal["usual", "prior", "random", "wanda", "fisher", "both"]
# Those that learn from a step: from the prior the dropped ones, else all; or what it says. Of straight-through alone.
Neurons = Literal["usual", "all", "dropped"]
# The sculpt's examples; half of its questions; more of them; one plain answer a question, selected or any, in character
# or the instruction set's own.
Data = Literal["sculpt", "first half", "second half", "more", "selected", "any", "selected neutral", "any neutral"]

AMOUNTS = (120, 240, 480, 960, 1920)
QUESTION_SHARES = (0.2, 0.5)
TEMPERATURES = (0.03, 0.1)  # scores start as ranks in [0, 1]
STREAMS = 64  # answers written at once


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to learn a mask; the defaults are the reference."""

    loss: Loss = "kl"
    start: Start = "usual"
    estimator: Estimator = "straight-through"
    neurons: Neurons = "usual"
    temperature: float = 0.0
    annealed: bool = False
    optimizer: Optimizer = "damped"
    averaged: bool = True
    data: Data = "sculpt"
    num_examples: int = 0  # the first so many; 0: all
    steps: int = 0  # 0: as many as the run's
    question_share: float = 0.0  # of an example's weight, for the tokens of its question
    seed: int = 0  # of the order of examples, and of what is random

    @property
    def name(self) -> str:
        """What differs from the reference; also the cell's file name."""
        changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        return ", ".join(f"{name} {getattr(self, name)}" for name in changed) or "reference"


REFERENCE = Variant()


class Run:
    """The base, and how every mask is learned on it."""

    def __init__(
        self,
        base: Base,
        *,
        preset: str,
        steps: int,
        cache_dir: Path,
        start: SculptStart = "prior",
        amounts: Sequence[int] = AMOUNTS,
    ) -> None:
        self.base = base
        self.amounts = amounts
        self.settings = PRESETS[preset]
        self.steps = steps
        self.prior = prior_of(base, cache_dir)
        self._start = start
        self.questions = load_instructions()
        self._identity = {"base": base.fingerprint, "preset": preset, "steps": steps, "start": start, "method": METHOD}

    @property
    def from_prior(self) -> bool:
        """Whether the reference starts from the prior."""
        return self._start == "prior" and self.prior is not None

    def identity(self, kept: int) -> dict[str, Any]:
        """What masks of this many neurons depend on beside their persona."""
        return self._identity | {"prior": None if self.prior is None else self.prior.digest(kept)}

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base as gradients need it, built once."""
        return build_learner(self.base)

    def learn(
        self,
        variant: Variant,
        start: torch.Tensor,
        kept: int,
        batch: Callable[[int], list[Example]],  # by step
        validation_kl: Callable[[torch.Tensor], float],  # of a mask
        cells: Workdir,
    ) -> dict[str, torch.Tensor]:
        """`mask`, the best on validation, and the last `scores`; resumed from the last checkpoint in `cells`."""
        from_prior = self.from_prior if variant.start == "usual" else variant.start == "prior"
        steps = variant.steps or self.steps
        learner = EstimatorLearner(
            self.model,
            start,
            kept,
            steps=steps,
            learning_rate=self.settings.rate(from_prior=from_prior),
            dropped_alone=variant.estimator == "straight-through"
            and (from_prior if variant.neurons == "usual" else variant.neurons == "dropped"),
            loss=variant.loss,
            question_share=variant.question_share,
            estimator=variant.estimator,
            temperature=variant.temperature,
            annealed=variant.annealed,
            optimizer=variant.optimizer,
            averaged=variant.averaged,
            seed=variant.seed,
        )
        checkpoint = f"learning {variant.name}"
        state = cells.read_tensors(checkpoint)
        if state is None:
            best = learner.mask()
            lowest = validation_kl(best)
        else:
            best, lowest = state.pop("best"), float(state.pop("lowest"))
            learner.restore(state)
        while learner.step_number < steps:
            learner.step(batch(learner.step_number))
            number = learner.step_number
            if number % self.settings.validate_every == 0 or number == steps:
                mask = learner.mask()
                kl = validation_kl(mask)
                if kl < lowest:
                    best, lowest = mask, kl
                found = {"best": best, "lowest": torch.tensor(lowest, dtype=torch.float64)}
                cells.write_tensors(checkpoint, learner.state() | found)
        return {"mask": best, "scores": learner.scores.detach()}

    def answer(self, system_prompt: str, questions: Sequence[Instruction], count: int) -> list[Example]:
        """`count` plain answers to the questions, each in turn, by the base under a persona prompt."""
        samples = math.ceil(count / len(questions))
        planned = plan_training([(one, 0.0) for one in questions], samples, 0.0, seed=1)[:count]
        engine = Engine(self.base, EngineSettings(max_num_seqs=STREAMS, max_queue=len(planned)))
        with closing(engine):
            given = answer(
                planned,
                base=self.base,
                system_prompt=system_prompt,
                teacher=SelfTeacher(engine, PersonaFunction(f"base:{self.base.fingerprint}", "ablations", None)),
                max_tokens=self.settings.answer_tokens,
            )
        by_id = {one.id: one for one in given}
        return [by_id[one.id] for one in planned if one.id in by_id]

    def neutral(self, example: Example) -> Example:
        """The same question with the instruction set's own answer, in nobody's voice."""
        text = next(one.output for one in self.questions.train if one.id == example.question_id)
        tokenizer = self.base.tokenizer
        tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        limit = self.settings.answer_tokens
        ended = len(tokens) <= limit
        return replace(example, answer_text=text, answer=tuple(tokens[:limit]), ended=ended, dense_states=None)


class Persona:
    """One persona at one sparsity, and every mask that is learned for it."""

    def __init__(self, run: Run, persona_id: str, result: SculptResult, folder: Path) -> None:
        self.id = persona_id
        self.digest = result.subnetwork.digest
        self.given = material(result)
        self.kept = int(self.given.mask[0].sum())
        self._run = run
        self._system_prompt = result.system_prompt
        self._cells = Workdir(folder, run.identity(self.kept) | {"digest": self.digest})

    def learned(self, variant: Variant) -> dict[str, torch.Tensor]:
        """The variant's `mask` and `scores`, `[layers, intermediate]`, learned now where they were not before."""
        saved = self._cells.read_tensors(variant.name)
        if saved is None:
            batch = Epochs(self.examples(variant), self._run.settings.branches_per_step, variant.seed).batch
            start = self.start(variant)
            saved = self._run.learn(variant, start, self.kept, batch, self.validation_kl, self._cells)
            self._cells.write_tensors(variant.name, saved)
        return saved

    def test_kl(self, variant: Variant) -> Values:
        """Of the variant's mask, by test question, nats a token."""
        values = self._cells.read_json(variant.name)
        if values is None:
            values = self.test_kl_of(self.learned(variant)["mask"]).tolist()
            self._cells.write_json(variant.name, values)
            print(f"{self.id}: {variant.name}: {np.mean(values):.3f}", file=sys.stderr, flush=True)
        return np.array(values)

    def test_kl_of(self, mask: torch.Tensor) -> Values:
        """Of any mask, by test question."""
        return self._test.divergence(masked(self._run.model, mask)).kl.double().numpy()

    def validation_kl(self, mask: torch.Tensor) -> float:
        """Of any mask, the mean over the validation questions."""
        return float(self._validation.divergence(masked(self._run.model, mask)).kl.mean())

    @cached_property
    def _validation(self) -> HeldOut:
        return HeldOut(self._run.model, self.given.validation)

    @cached_property
    def _test(self) -> HeldOut:
        return HeldOut(self._run.model, self.given.test)

    def units(self) -> torch.Tensor:
        """The dense base's unit block outputs on the validation questions, `[questions, blocks, hidden]`."""
        run = self._run
        return persona_units(run.base, run.model, self._system_prompt, run.questions.validation)

    def start(self, variant: Variant) -> torch.Tensor:
        """The scores a variant begins with, `[layers, intermediate]`."""
        if variant.start == "random":
            return torch.rand(self.given.mask.shape, generator=torch.Generator().manual_seed(variant.seed))
        chosen = {"usual": "prior" if self._run.from_prior else "both"}.get(variant.start, variant.start)
        if chosen == "prior":
            assert self._run.prior is not None  # the run and its studies ask for it where there is one
            return averaged_ranks(self._run.prior.at(self.kept))
        saved = self._cells.read_tensors("importance")
        if saved is None:
            few = self.given.train[: self._run.settings.num_importance]
            model = self._run.model
            saved = {"wanda": activation_importance(model, few), "fisher": fisher_importance(model, few)}
            self._cells.write_tensors("importance", saved)
        return averaged_ranks(*(saved.values() if chosen == "both" else [saved[chosen]]))

    def examples(self, variant: Variant) -> list[Example]:
        """What a variant learns from."""
        found = self._examples(variant.data)
        return found[: variant.num_examples] if variant.num_examples else found

    def _examples(self, data: Data) -> list[Example]:
        train = self.given.train
        selected = list(dict.fromkeys(one.question_id for one in train))
        if data == "sculpt":
            return train
        if data in ("first half", "second half"):
            half = set(selected[0 if data == "first half" else 1 :: 2])
            return [one for one in train if one.question_id in half]
        if data == "more":
            missing = max(self._run.amounts) - len(train)
            return train if missing <= 0 else [*train, *self._answered("more", selected, missing)]
        ids = selected if data.startswith("selected") else self._any(len(selected))
        answered = self._answered(data.removesuffix(" neutral"), ids, len(ids))
        return [self._run.neutral(one) for one in answered] if data.endswith("neutral") else answered

    def _any(self, count: int) -> list[str]:
        """Training questions chosen by nothing."""
        ids = [one.id for one in self._run.questions.train]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        return [ids[index] for index in order[:count]]

    def _answered(self, name: str, ids: Sequence[str], count: int) -> list[Example]:
        """Plain answers of the base in the persona's voice, kept under `name`."""
        found = self._cells.read_examples(name)
        if not found:
            by_id = {one.id: one for one in self._run.questions.train}
            found = self._run.answer(self._system_prompt, [by_id[one] for one in ids], count)
            self._cells.write_examples(name, found)
        return found


class Study:
    """The personas of a run, and each question asked of them: its docstring, answered by lines of Markdown."""

    def __init__(self, run: Run, people: Sequence[Persona], folder: Path) -> None:
        self._run = run
        self._people = people
        self._folder = folder

    def loss(self) -> list[str]:
        """KL to the dense model, or cross-entropy on its answers."""
        return self._compared([REFERENCE, Variant(loss="cross_entropy")])

    def supervision(self) -> list[str]:
        """Answers alone, or the questions' tokens too, with so much of an example's weight."""
        return self._compared([REFERENCE, *(Variant(question_share=one) for one in QUESTION_SHARES)])

    def start(self) -> list[str]:
        """Where scores start."""
        starts: list[Start] = ["random", "wanda", "fisher"]
        if self._run.from_prior:
            starts.append("both")
        elif self._run.prior is not None:
            starts.append("prior")
        return self._compared([REFERENCE, *(Variant(start=one) for one in starts)])

    def estimator(self) -> list[str]:
        """Straight-through, to dropped neurons or to all, Gumbel-softmax top-k or soft top-k."""
        kinds: tuple[Estimator, ...] = ("gumbel", "soft")
        others = [Variant(neurons="all" if self._run.from_prior else "dropped")]
        others += [Variant(estimator=kind, temperature=one) for kind in kinds for one in TEMPERATURES]
        return self._compared([REFERENCE, *others])

    def annealing(self) -> list[str]:
        """The whole sparsity from the first step, or one that grows."""
        return self._compared([REFERENCE, Variant(annealed=True)])

    def optimizer(self) -> list[str]:
        """Damped Adam or Adam, and the weighted average of the scores or the last ones."""
        plain = Variant(averaged=False)
        return self._compared([REFERENCE, plain, Variant(optimizer="adam"), replace(plain, optimizer="adam")])

    def amount(self) -> list[str]:
        """So many different examples, each learned from once; and some of them again and again."""
        size = self._run.settings.branches_per_step
        once = [Variant(data="more", num_examples=one, steps=math.ceil(one / size)) for one in self._run.amounts]
        again = replace(once[1], steps=once[-2].steps)
        return self._compared([*once, again])

    def voice(self) -> list[str]:
        """Selected questions or any, answers in character or neutral; cross-entropy, one answer a question."""
        kinds: tuple[Data, ...] = ("selected", "any", "selected neutral", "any neutral")
        return self._compared([Variant(loss="cross_entropy", data=data) for data in kinds])

    def whose(self) -> list[str]:
        """A persona's own mask, the others', and one learned from all of them in as many steps."""
        if len(self._people) < 2:
            return ["One persona alone has no other's mask to compare with."]
        together = self._pooled()
        lines = header("persona", "own", "others', mean", "one for all", "own below others'", "own below one for all")
        columns: tuple[list[Values], ...] = ([], [], [])
        for one in self._people:
            others = [one.test_kl_of(other.learned(REFERENCE)["mask"]) for other in self._people if other is not one]
            found = (one.test_kl(REFERENCE), np.mean(others, axis=0), one.test_kl_of(together))
            for column, values in zip(columns, found, strict=True):
                column.append(values)
            lines.append(self._swaps(one.id, [[values] for values in found]))
        return [*lines, self._swaps("all", columns)]

    @staticmethod
    def _swaps(name: str, columns: Sequence[Sequence[Values]]) -> str:
        own, *others = columns
        below = [percent(gap_closed(own, other)) for other in others]
        return row(name, *(f"{_mean(column):.3f}" for column in columns), *below)

    def _pooled(self) -> torch.Tensor:
        """The mask that is learned from all personas in turn: in all as many steps, branches and tokens as one's."""
        people, run = self._people, self._run
        cells = Workdir(self._folder, run.identity(people[0].kept) | {"digests": [one.digest for one in people]})
        saved = cells.read_tensors("pooled")
        if saved is None:
            orders = [Epochs(one.examples(REFERENCE), run.settings.branches_per_step, 0) for one in people]
            starts = [one.start(REFERENCE) for one in people]
            saved = run.learn(
                REFERENCE,
                torch.stack(starts).mean(dim=0),
                people[0].kept,
                lambda step: orders[step % len(people)].batch(step // len(people)),
                lambda mask: float(np.mean([one.validation_kl(mask) for one in people])),
                cells,
            )
            cells.write_tensors("pooled", saved)
        return saved["mask"]

    def seeds(self) -> list[str]:
        """How far two runs agree that differ in their order, in their questions, or in where they start."""
        pairs = {
            "order of examples": (REFERENCE, Variant(seed=1)),
            "halves of the questions": (Variant(data="first half"), Variant(data="second half")),
            "random starts": (Variant(start="random"), Variant(start="random", seed=1)),
        }
        lines = header("differ in", "correlation of scores", "Jaccard of masks", "by chance")
        for name, variants in pairs.items():
            both = [tuple(one.learned(variant) for variant in variants) for one in self._people]
            correlation = np.mean([_correlation(first["scores"], second["scores"]) for first, second in both])
            overlap = np.mean([jaccard(first["mask"], second["mask"]) for first, second in both])
            lines.append(row(name, f"{correlation:.3f}", f"{overlap:.3f}", f"{self._chance():.3f}"))
        return lines

    def similarity(self) -> list[str]:
        """Whether similar personas have similar masks."""
        pairs = list(combinations(self._people, 2))
        if len(pairs) < 3:
            return ["A correlation over pairs needs three personas."]
        units = {one.id: one.units() for one in self._people}
        masks = {one.id: one.learned(REFERENCE)["mask"] for one in self._people}
        lines = header("pair", "similarity of personas", "Jaccard of masks")
        alike, overlaps = [], []
        for one, other in pairs:
            alike.append(float((units[one.id] * units[other.id]).sum(dim=-1).mean()))
            overlaps.append(jaccard(masks[one.id], masks[other.id]))
            lines.append(row(f"{one.id}, {other.id}", f"{alike[-1]:.4f}", f"{overlaps[-1]:.3f}"))
        r = float(np.corrcoef(alike, overlaps)[0, 1])
        chance = self._chance()
        return [*lines, "", f"Pearson's r over {len(pairs)} pairs: {r:.3f}. Jaccard by chance: {chance:.3f}."]

    def _compared(self, variants: Sequence[Variant]) -> list[str]:
        """Test KL of each variant, and how far it is below that of the first."""
        lines = header("variant", "KL", f"below {variants[0].name}")
        first = [one.test_kl(variants[0]) for one in self._people]
        for variant in variants:
            found = [one.test_kl(variant) for one in self._people]
            below = "" if variant == variants[0] else percent(gap_closed(found, first))
            lines.append(row(variant.name, f"{_mean(found):.3f}", below))
        return lines

    def _chance(self) -> float:
        """The Jaccard of two random masks of this size."""
        share = self._people[0].kept / self._people[0].given.mask.shape[1]
        return share / (2 - share)


STUDIES = (
    "loss",
    "supervision",
    "start",
    "estimator",
    "annealing",
    "optimizer",
    "amount",
    "voice",
    "whose",
    "seeds",
    "similarity",
)


def jaccard(one: torch.Tensor, other: torch.Tensor) -> float:
    """Shared over joined neurons of two masks, the mean over layers."""
    shared, joined = (one * other).sum(dim=1), torch.maximum(one, other).sum(dim=1)
    return float((shared / joined).mean())


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's, over all layers' scores."""
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def _mean(values: Sequence[Values]) -> float:
    """Over personas, which count the same."""
    return float(np.mean([one.mean() for one in values]))


def main() -> None:
    """Sculpt or find, learn every variant, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    cache_dir = options.workdir / "cache"
    base = load_base(options.model, cache_dir=cache_dir)
    amounts = AMOUNTS[:3] if options.quick else AMOUNTS
    run = Run(
        base, preset=options.preset, steps=options.steps, start=options.start, cache_dir=cache_dir, amounts=amounts
    )
    learning = f"{options.start}-{options.steps}"  # runs that learn otherwise have cells of their own
    people = []
    for persona_id, name, text in personas(options.personas):
        spec = SculptSpec(persona_id, name, text, sparsity=options.sparsity, preset=options.preset)
        result = sculpted(spec, base, options.workdir)
        folder = options.workdir / f"{persona_id}-{options.sparsity}" / "ablations" / learning
        people.append(Persona(run, persona_id, result, folder))
    study = Study(run, people, options.workdir / f"pooled-{options.sparsity}" / learning)
    lines = _head(options, run, people)
    for name in options.studies:
        asked = getattr(study, name)
        lines += ["", f"## {asked.__doc__}", "", *asked()]
        if options.out:
            options.out.write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(lines))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--steps", type=int, help="of every variant; default: the preset's")
    parser.add_argument("--start", choices=get_args(SculptStart), default="prior", help="the reference's (%(default)s)")
    parser.add_argument("--workdir", type=Path, help="default: that of fidelity.py, or one of its own with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown, study by study")
    options = parser.parse_args()
    if options.quick:
        options.preset = "smoke"
    if options.steps is None:
        options.steps = PRESETS[options.preset].steps
    if options.workdir is None:
        options.workdir = usual_workdir(quick=options.quick)
    return options


def _head(options: argparse.Namespace, run: Run, people: Sequence[Persona]) -> list[str]:
    return [
        "# What each part of mask learning is worth",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"{', '.join(one.id for one in people)} at {options.sparsity:.0%}; {options.steps} steps of "
        f"{PRESETS[options.preset].branches_per_step} branches each, where a variant says nothing else.",
        f"The reference starts from {'the prior' if run.from_prior else 'both importances'}.",
        "KL to the dense persona model in nats a token over the test questions, the mean over personas; *below* is",
        "1 - KL(variant) / KL(the first), with its 95 % interval from a paired bootstrap over questions, nested in",
        "personas: negative where the variant is worse.",
    ]


if __name__ == "__main__":
    main()
