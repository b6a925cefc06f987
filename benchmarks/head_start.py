"""How soon learning from the base's prior is where learning from scratch ends.

    python benchmarks/head_start.py --quick                       # minutes: a small sculpt, to try it
    python benchmarks/head_start.py examples/personas/*.txt       # 60 steps a persona and sparsity, and what follows

Personas are text files or ids of ready personas. Each is sculpted (or its sculpt is found in the work directory, which
is that of fidelity.py) for its examples. *Scratch* starts from the mean of Wanda's and Fisher's ranks and takes all its
steps; its goal is the lowest validation KL on the way. *Prior* starts from the prior's scores, under the same schedule
and the same batches, until it is there. Seconds are those of the steps alone, without validation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import machine
from sculpts import Material, material, personas, sculpted, usual_workdir
from tables import header, row

from masquerade_engine.base import BUNDLED, load_base
from masquerade_engine.threads import available_cores
from masquerade_pruner import SculptSpec
from masquerade_pruner.epochs import Epochs
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import activation_importance, averaged_ranks, fisher_importance
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import MaskLearner
from masquerade_pruner.presets import PRESETS
from masquerade_pruner.prior import prior_of
from masquerade_pruner.tree import masked
from masquerade_pruner.workdir import Workdir

At = tuple[int, float, float]  # steps, seconds of these, KL on validation


def main() -> None:
    """Learn both ways, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.workdir / "cache")
    prior = prior_of(base, options.workdir / "cache")
    if prior is None:
        sys.exit("This base has no prior: `masquerade prior` learns one.")
    settings, model = PRESETS[options.preset], build_learner(base)
    lines = _head(options)
    for persona_id, name, text in personas(options.personas):
        for sparsity in options.sparsity:
            spec = SculptSpec(persona_id, name, text, sparsity=sparsity, preset=options.preset)
            result = sculpted(spec, base, options.workdir)
            given, kept = material(result), int(result.subnetwork.mask.to_dense()[0].sum())
            cells = Workdir(
                options.workdir / f"{persona_id}-{sparsity}" / "head-start",
                {"digest": result.subnetwork.digest, "prior": prior.digest(kept), "steps": options.steps}
                | {"every": options.every, "settings": result.settings},
            )
            found = cells.read_json("found")
            if found is None:
                few = given.train[: settings.num_importance]
                ranks = averaged_ranks(activation_importance(model, few), fisher_importance(model, few))
                race = Race(model, given, kept, options)
                scratch = list(race.run(ranks, from_prior=False))
                goal = min(kl for _, _, kl in scratch)
                found = {
                    "scratch": scratch,
                    "prior": list(race.run(averaged_ranks(prior.at(kept)), goal, from_prior=True)),
                }
                cells.write_json("found", found)
            lines.append(_line(persona_id, sparsity, found))
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join([*lines, ""]), "utf-8")


class Race:
    """One persona's examples at one size, which every start learns from in the same order."""

    def __init__(self, model: torch.nn.Module, given: Material, kept: int, options: argparse.Namespace) -> None:
        self._model, self._given, self._kept, self._options = model, given, kept, options
        self._held_out = HeldOut(model, given.validation)

    def run(self, start: torch.Tensor, goal: float | None = None, *, from_prior: bool) -> Iterator[At]:
        """Every measurement up to the first that reaches the goal, or the last."""
        options, settings = self._options, PRESETS[self._options.preset]
        learner = MaskLearner(
            self._model,
            start,
            self._kept,
            steps=options.steps,
            learning_rate=settings.rate(from_prior=from_prior),
            dropped_alone=from_prior,
        )
        order = Epochs(self._given.train, settings.branches_per_step, 0)
        seconds = 0.0
        while True:
            kl = float(self._held_out.divergence(masked(self._model, learner.mask())).kl.mean())
            yield learner.step_number, round(seconds, 2), round(kl, 5)
            if learner.step_number >= options.steps or (goal is not None and kl <= goal):
                return
            for _ in range(min(options.every, options.steps - learner.step_number)):
                began = time.monotonic()
                learner.step(order.batch(learner.step_number))
                seconds += time.monotonic() - began


def _line(persona: str, sparsity: float, found: dict[str, list[At]]) -> str:
    scratch, prior = found["scratch"], found["prior"]
    goal = min(kl for _, _, kl in scratch)
    steps, seconds, kl = prior[-1]
    ratio = f"{seconds / scratch[-1][1]:.2f}" if kl <= goal else "not reached"
    kls = (f"{one:.3f}" for one in (scratch[0][2], goal, prior[0][2], kl))
    return row(persona, f"{sparsity:.0%}", *kls, f"{scratch[-1][1]:.0f}", f"{steps}", f"{seconds:.0f}", ratio)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--steps", type=int, default=60, help="of learning from scratch")
    parser.add_argument("--every", type=int, default=6, help="steps between two measurements")
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--workdir", type=Path, help="default: that of fidelity.py, or one of its own with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset, one persona, one sparsity, six steps")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.steps, options.every = "smoke", 6, 2
        options.personas, options.sparsity = (options.personas or ["pip"])[:1], options.sparsity[:1]
    if options.workdir is None:
        options.workdir = usual_workdir(quick=options.quick)
    return options


def _head(options: argparse.Namespace) -> list[str]:
    return [
        "# Learning from the prior and from scratch",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"Mean KL over validation questions, nats a token. Scratch takes {options.steps} steps; the prior is measured",
        f"every {options.every} steps until it has scratch's lowest KL.",
        "",
        *header(
            *("persona", "sparsity", "scratch, start", "scratch, lowest", "prior, start", "prior, there"),
            *("scratch, s", "prior, steps", "prior, s", "share of scratch's seconds"),
        ),
    ]


if __name__ == "__main__":
    main()
