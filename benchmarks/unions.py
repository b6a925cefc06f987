"""How many neurons a cast's masks keep between them, learned alone and pulled together, and what the pull costs in KL.

    python benchmarks/unions.py --quick                      # minutes: two personas in few steps, to try it
    python benchmarks/unions.py --personas 8 --sparsity 0.5  # some 15 minutes, two cores
    python benchmarks/unions.py --pull 0.3 1 --out unions.md

The personas of benchmarks/casts/village.json learn in their order from one set of answers each, masks of every sparsity
together: *alone*, and *pulled* towards the pulled masks of those before. KL to the dense persona model is read on
validation and on test. Of several pulls validation chooses one for all sparsities: that of the smallest union of those
that cost at most 3 % more KL at each. So that a cast fits an evening, learning is short: few steps, few branches, few
questions; the tables say how few. Each mask is kept in the work directory: a killed run goes on where it was, and
`--out` is written anew after every persona.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from sculpts import Personas, mask_digest
from tables import header, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import Mask, SettingError, chance_jaccard, round_kept, union
from masquerade_pruner import PRESETS, SculptSettings, SculptSpec, answered
from masquerade_pruner.bootstrap import Interval, Values, gap_closed
from masquerade_pruner.epochs import Epochs
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import averaged_ranks
from masquerade_pruner.instructions import load_instructions
from masquerade_pruner.learner import build_learner
from masquerade_pruner.losses import chunked_kl
from masquerade_pruner.mask_learning import MaskLearner, Planted, dense_states, reach
from masquerade_pruner.prior import prior_of
from masquerade_pruner.tree import TreeContext, head_weight, masked, run_tree
from masquerade_pruner.workdir import Workdir

VILLAGE = Path(__file__).parent / "casts" / "village.json"
STEPS = 8
BRANCHES = 8  # a step
QUESTIONS = 32  # of validation, and of test
LIMIT = 1.03  # times the KL of the masks alone: what a pull may cost on validation


@dataclass(frozen=True, slots=True)
class Learned:
    """A mask and its KL to the dense persona model, nats a token."""

    mask: Mask
    validation: float  # mean over questions
    test: Values  # by question


@dataclass(frozen=True, slots=True)
class Cast:
    """The masks of one sparsity, in the order of the personas."""

    sparsity: float
    alone: list[Learned]
    pulled: dict[float, list[Learned]]  # by pull; whoever comes first has no cast yet, and is as alone


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One mask of a persona."""

    sparsity: float
    pull: float
    towards: Sequence[Mask]


class Run:
    """How every mask is learned, each once, and kept in `workdir`."""

    def __init__(self, base: Base, settings: SculptSettings, workdir: Path, instructions: Path | None = None) -> None:
        self._base = base
        self._settings = settings
        self._workdir = workdir
        self._instructions = instructions
        prior = prior_of(base, workdir / "cache")
        if prior is None:
            raise SettingError("model", "has no prior, which a cast's masks start from; `masquerade prior` learns one")
        self.prior = prior
        self._identity = {
            "base": base.fingerprint,
            "dtype": str(base.dtype),
            "instructions": load_instructions(instructions).digest,
        }

    @cached_property
    def _model(self) -> torch.nn.Module:
        return build_learner(self._base)

    def add(self, persona: tuple[str, str, str], casts: Sequence[Cast]) -> None:
        """Learn one more persona's masks, the pulled ones towards those that each cast has."""
        columns, wanted = [], []
        for cast in casts:
            columns.append(cast.alone)
            wanted.append(_Wanted(cast.sparsity, 0.0, []))
            for pull, before in cast.pulled.items():
                if before:
                    columns.append(before)
                    wanted.append(_Wanted(cast.sparsity, pull, [one.mask for one in before]))
        for column, learned in zip(columns, self._found(persona, wanted), strict=True):
            column.append(learned)
        for cast in casts:
            for before in cast.pulled.values():
                before[:] = before or cast.alone  # the first has nobody to be pulled towards

    def _found(self, persona: tuple[str, str, str], wanted: Sequence[_Wanted]) -> list[Learned]:
        cells = [self._cell(persona, one) for one in wanted]
        missing = {cell.path: (cell, one) for cell, one in zip(cells, wanted, strict=True) if not _read(cell)}
        if missing:
            learned = self._learn(persona, [one for _, one in missing.values()])
            for (cell, _), one in zip(missing.values(), learned, strict=True):
                cell.write_tensors("mask", {"mask": torch.from_numpy(one.mask.to_dense())})
                cell.write_json("figures", {"validation": one.validation, "test": one.test.tolist()})
        return [one for cell in cells for one in _read(cell)]

    def _cell(self, persona: tuple[str, str, str], one: _Wanted) -> Workdir:
        kept = round_kept(self._base.shape.intermediate_size, one.sparsity)
        identity = self._identity | {
            "persona": persona,
            "sparsity": one.sparsity,
            "prior": self.prior.digest(kept),
            "settings": asdict(replace(self._settings, cast_pull=one.pull)),
            "cast": [hashlib.sha256(mask.bits.tobytes()).hexdigest() for mask in one.towards],
        }
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return Workdir(self._workdir / f"{persona[0]}-{one.sparsity}-{one.pull}-{digest[:12]}", {"digest": digest})

    def _learn(self, persona: tuple[str, str, str], wanted: Sequence[_Wanted]) -> list[Learned]:
        """As `sculpt` learns, all from the same batches at once."""
        began, settings = time.monotonic(), self._settings
        spec = SculptSpec(*persona, numbers=settings, instructions=self._instructions)
        given = answered(spec, self._base, self._workdir / persona[0], cache_dir=self._workdir / "cache")
        print(f"{persona[0]}: answers, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        divergence = {name: _Divergence(self._model, getattr(given, name)) for name in ("validation", "test")}
        dense = _Dense(self._model)
        learners = [self._learner(one, dense) for one in wanted]
        best = [learner.mask() for learner in learners]
        order = Epochs(given.train, settings.branches_per_step, 0)
        moving = [learner for learner in learners if learner.may_move()]
        for number in range(1, settings.steps + 1):
            for learner in moving:
                learner.step(order.batch(number - 1))
            if number % settings.validate_every == 0 or number == settings.steps:
                masks = [learner.mask() for learner in learners]
                best = [min(pair, key=divergence["validation"].mean) for pair in zip(best, masks, strict=True)]
        print(f"{persona[0]}: {len(wanted)} masks, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return [
            Learned(Mask.from_dense(mask.bool().numpy()), divergence["validation"].mean(mask), divergence["test"](mask))
            for mask in best
        ]

    def _learner(self, one: _Wanted, dense: _Dense) -> _Learner:
        kept = round_kept(self._base.shape.intermediate_size, one.sparsity)
        scores = averaged_ranks(self.prior.at(kept))
        usage = torch.zeros_like(scores)
        for mask in one.towards:
            usage += torch.from_numpy(mask.to_dense()).float() / len(one.towards)
        return _Learner(
            self._model,
            scores,
            kept,
            steps=self._settings.steps,
            learning_rate=self._settings.learning_rate,
            dropped_alone=True,
            pull=one.pull * reach(self._settings.steps, self._settings.learning_rate) * usage,
            dense=dense,
        )


def _read(cell: Workdir) -> list[Learned]:
    """What the cell holds: one, or none yet."""
    figures, mask = cell.read_json("figures"), cell.read_tensors("mask")
    if figures is None or mask is None:
        return []
    return [Learned(Mask.from_dense(mask["mask"].numpy()), figures["validation"], np.array(figures["test"]))]


class _Dense:
    """The dense model's states on a batch, computed once for all that learn from it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._of: torch.Tensor | None = None  # the tokens of the batch

    def __call__(self, planted: Planted) -> torch.Tensor:
        """`[supervised, hidden]`."""
        tokens = planted.tree.token_ids
        if self._of is None or not torch.equal(self._of, tokens):
            self._of, self._states = tokens, dense_states(self._model, planted)
        return self._states


class _Learner(MaskLearner):
    """A mask learner that is told the dense model's states."""

    def __init__(self, *args: Any, dense: _Dense, **named: Any) -> None:
        super().__init__(*args, **named)
        self._dense = dense

    def may_move(self) -> bool:
        """Whether any neuron that the first mask drops could rise past one that it keeps, which stand still.

        A step of damped Adam is at most some 1.2 learning rates long.
        """
        most = 1.5 * reach(self._steps, self._learning_rate)
        chosen_by, kept = self.scores.detach() + self._pull, self.mask() > 0
        lowest = chosen_by.masked_fill(~kept, torch.inf).amin(dim=1)
        highest = chosen_by.masked_fill(kept, -torch.inf).amax(dim=1)
        return bool((lowest - highest < most).any())

    def _loss_of(self, planted: Planted) -> torch.Tensor:
        context = TreeContext(planted.tree, self.training_mask())
        states = run_tree(self._model, planted.tree, context)[planted.rows]
        return chunked_kl(states, self._dense(planted), head_weight(self._model), planted.weights)


class _Divergence:
    """KL of masks to the dense model on one split, each mask's computed once."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[Example]) -> None:
        self._model = model
        self._held_out = HeldOut(model, examples)
        self._known: dict[str, Values] = {}

    def __call__(self, mask: torch.Tensor) -> Values:
        """By question, nats a token."""
        digest = mask_digest(mask)
        if digest not in self._known:
            self._known[digest] = self._held_out.divergence(masked(self._model, mask)).kl.double().numpy()
        return self._known[digest]

    def mean(self, mask: torch.Tensor) -> float:
        """Over the questions."""
        return float(self(mask).mean())


# --- the arithmetic


def union_fraction(learned: Sequence[Learned]) -> float:
    """The share of neurons that any of the masks keeps, the mean over layers."""
    return float(union(one.mask for one in learned).mean())


def chance_union(share: float, count: int) -> float:
    """The same of `count` unrelated masks, each keeping `share` of the neurons."""
    return 1 - (1 - share) ** count


def mean_jaccard(learned: Sequence[Learned]) -> float:
    """The mean over pairs of masks."""
    return float(np.mean([one.mask.jaccard(other.mask) for one, other in combinations(learned, 2)]))


def kl_ratio(pulled: Sequence[Learned], alone: Sequence[Learned]) -> Interval:
    """KL pulled over KL alone on test, the mean over personas, with a paired bootstrap over questions within them."""
    closed = gap_closed([one.test for one in pulled], [one.test for one in alone])
    return Interval(1 - closed.mean, 1 - closed.high, 1 - closed.low)


def validation_ratio(pulled: Sequence[Learned], alone: Sequence[Learned]) -> float:
    """KL pulled over KL alone on validation, the mean over personas."""
    return float(np.mean([one.validation / other.validation for one, other in zip(pulled, alone, strict=True)]))


def chosen(casts: Sequence[Cast]) -> float | None:
    """The pull of the smallest union, the mean over casts, of those that each cast can afford; None if there is none.

    What it costs is asked of the pulled alone: the first of a cast has nobody to be pulled towards.
    """
    affordable = [
        pull
        for pull in casts[0].pulled
        if all(validation_ratio(cast.pulled[pull][1:], cast.alone[1:]) <= LIMIT for cast in casts)
    ]
    size = {pull: sum(union_fraction(cast.pulled[pull]) for cast in casts) for pull in affordable}
    return min(size, key=lambda pull: size[pull], default=None)


# --- the tables


def tables(casts: Sequence[Cast], names: Sequence[str]) -> list[str]:
    """The choice; then for each sparsity all pulls, each one's curve, and the personas one by one."""
    choice = chosen(casts)
    said = "Every pull costs more than that." if choice is None else f"Chosen on validation: **{choice}**."
    lines = [said]
    for cast in casts:
        lines += ["", f"## {cast.sparsity:.0%} dropped", "", *_pulls(cast)]
        for pull, pulled in cast.pulled.items():
            lines += ["", f"The first so many masks, pulled by {pull}:", "", *_curve(cast.alone, pulled)]
        lines += ["", *_personas(cast, names)]
    return lines


def _pulls(cast: Cast) -> list[str]:
    mask, count = cast.alone[0].mask, len(cast.alone)
    lines = header("pull", f"union of {count}", "Jaccard", "validation KL", "over alone", "test KL", "over alone")
    by_chance = chance_union(1 - mask.sparsity, count), chance_jaccard(mask.kept, mask.intermediate_size)
    lines.append(row("unrelated masks", *_shares(*by_chance), *[""] * 4))
    alone = cast.alone[1:]
    validation, test = _mean_kl(alone)
    lines.append(row("alone", *_shares(union_fraction(cast.alone), mean_jaccard(cast.alone)), validation, "", test, ""))
    for pull, learned in cast.pulled.items():
        pulled = learned[1:]
        validation, test = _mean_kl(pulled)
        ratios = f"{validation_ratio(pulled, alone):.3f}", _interval(kl_ratio(pulled, alone))
        shares = _shares(union_fraction(learned), mean_jaccard(learned))
        lines.append(row(str(pull), *shares, validation, ratios[0], test, ratios[1]))
    return lines


def _curve(alone: Sequence[Learned], pulled: Sequence[Learned]) -> list[str]:
    lines = header(
        "masks", "union, unrelated", "alone", "pulled", "Jaccard, alone", "pulled", "test KL, pulled over alone"
    )
    share = 1 - alone[0].mask.sparsity
    for count in range(2, len(alone) + 1):
        both = alone[:count], pulled[:count]
        unions = chance_union(share, count), *(union_fraction(one) for one in both)
        jaccards = (mean_jaccard(one) for one in both)
        ratio = _interval(kl_ratio(pulled[1:count], alone[1:count]))
        lines.append(row(str(count), *_shares(*unions, *jaccards), ratio))
    return lines


def _personas(cast: Cast, names: Sequence[str]) -> list[str]:
    sides = {"alone": cast.alone} | {str(pull): learned for pull, learned in cast.pulled.items()}
    columns = [f"{split} KL, {side}" for split in ("validation", "test") for side in sides]
    lines = header("persona", *columns)
    for index, name in enumerate(names):
        of_one = [learned[index] for learned in sides.values()]
        figures = [one.validation for one in of_one] + [one.test.mean() for one in of_one]
        lines.append(row(name, *_shares(*figures)))
    return lines


def _mean_kl(learned: Sequence[Learned]) -> tuple[str, str]:
    """Validation and test, the mean over personas."""
    means = np.mean([(one.validation, one.test.mean()) for one in learned], axis=0)
    return f"{means[0]:.3f}", f"{means[1]:.3f}"


def _shares(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _interval(ratio: Interval) -> str:
    return f"{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


# --- the command


def main() -> None:
    """Sculpt or find, compare, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.workdir / "cache")
    settings = short(PRESETS[options.preset], options.steps)
    run = Run(base, settings, options.workdir)
    people = village()[: options.personas]
    casts = [Cast(sparsity, [], {pull: [] for pull in options.pull}) for sparsity in options.sparsity]
    for count, persona in enumerate(people, 1):
        run.add(persona, casts)
        if options.out and count > 1:
            options.out.write_text(_page(casts, people[:count], settings), "utf-8")
    print(_page(casts, people, settings))


def village() -> Personas:
    """The cast, in the order in which it is sculpted."""
    return [(one["id"], one["name"], one["text"]) for one in json.loads(VILLAGE.read_text("utf-8"))]


def short(settings: SculptSettings, steps: int | None) -> SculptSettings:
    """A preset's numbers with fewer steps and questions, and nothing but KL on single turns measured."""
    return replace(
        settings,
        steps=min(settings.steps, STEPS) if steps is None else steps,
        branches_per_step=min(settings.branches_per_step, BRANCHES),
        num_validation=min(settings.num_validation, QUESTIONS),
        num_test=min(settings.num_test, QUESTIONS),
        num_test_scenes=0,
        num_free_running=0,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=24, help="the first so many of the village (%(default)s)")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--pull", nargs="+", type=float, default=[SculptSettings().cast_pull])
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help="whose learning (%(default)s)")
    parser.add_argument("--steps", type=int, help=f"of every mask; default: the preset's, at most {STEPS}")
    parser.add_argument("--workdir", type=Path, help="default: one of its own, another with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset, two personas, one sparsity")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown, persona by persona")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.personas, options.sparsity = "smoke", 2, options.sparsity[:1]
    if not 2 <= options.personas <= len(village()):
        parser.error(f"--personas: from 2 to {len(village())}")
    if min(options.pull) <= 0:
        parser.error("--pull: above 0; the masks alone are learned anyway")
    if options.workdir is None:
        # Other settings would clear the answers of a longer run.
        name = "masquerade-unions-quick" if options.quick else "masquerade-unions"
        options.workdir = Path(tempfile.gettempdir()) / name
    return options


def _page(casts: Sequence[Cast], people: Personas, settings: SculptSettings) -> str:
    lines = [
        "# What a cast's masks keep between them",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"The first {len(people)} personas of the village. Short learning, {settings.steps} steps of",
        f"{settings.branches_per_step} branches, from the base's prior;",
        f"{settings.num_validation} validation and {settings.num_test} test questions a persona, single turns, nothing",
        "free-running. *Union* is the share of neurons that any of the masks keeps, the mean over layers; *unrelated*",
        "masks of share k have 1 - (1 - k)^n. *Pulled* masks were learned towards the pulled masks before them: to a",
        "neuron that all of these keep, the pull adds so much of what the steps can add to a score (by 3 and more, no",
        "step can overcome it). KL to the dense persona model in nats a token; *over alone* is the mean over personas",
        "of KL pulled / KL alone, all but the first, who has nobody to be pulled towards, with its 95 % interval from",
        "a paired bootstrap over questions, nested in personas. A pull may cost",
        f"{LIMIT - 1:.0%} on validation at each sparsity; of those that may, the smallest union is chosen.",
        "",
        *tables(casts, [name for _, name, _ in people]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
