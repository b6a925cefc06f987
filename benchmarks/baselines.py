"""A learned mask beside every other method at the same size, from the same examples, with the same recovery.

    python benchmarks/baselines.py --quick                                     # minutes: one small sculpt, to try it
    python benchmarks/baselines.py examples/personas/*.txt                     # all methods without recovery
    python benchmarks/baselines.py --recoveries none vectors lora full         # ... and with each kind of it

Personas are text files or ids of ready personas. Each is sculpted at every sparsity (or its sculpt is found in the work
directory, which is that of fidelity.py); then every method of `masquerade_pruner.baselines` comes down to the same
number of parameters from the same examples. Methods that give a mask are then recovered with the same budget. KL to the
dense persona model is read on the test split; the strongest baseline of each column is chosen on validation. Each
(persona, sparsity, method, recovery) is kept in the work directory: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from sculpts import Material, examples_digest, mask_digest, material, personas, sculpted, usual_workdir
from tables import header, percent, row

from masquerade_engine.base import BUNDLED, load_base
from masquerade_engine.threads import available_cores
from masquerade_pruner import SculptSpec
from masquerade_pruner.baselines import MASKS, METHODS, Baseline, Setting
from masquerade_pruner.bootstrap import Values, gap_closed
from masquerade_pruner.evaluation import strongest_baseline
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import fluctuation
from masquerade_pruner.learner import build_learner
from masquerade_pruner.presets import PRESETS
from masquerade_pruner.prior import Prior, prior_of
from masquerade_pruner.recovery import RecoverySettings, recover
from masquerade_pruner.tree import Forward, masked
from masquerade_pruner.workdir import Workdir

OURS = "masquerade"
RECOVERIES = ("none", "vectors", "lora", "full")
# Recovery starts from a mask and brings a bias of its own: FLAP's mask with its bias would be recovered twice.
RECOVERED = (OURS, *(method for method in METHODS if method in MASKS - {"flap-bias"}))


@dataclass(frozen=True, slots=True)
class Figures:
    """One method on one persona: KL to the dense model in nats a token."""

    validation: list[float]  # by question
    test: list[float]  # by question
    num_dropped: int  # parameters
    seconds: float  # to build, recover and measure


@dataclass(frozen=True, slots=True)
class Case:
    """One persona at one sparsity."""

    persona: str
    sparsity: float
    comparison: Comparison


class Comparison:
    """Every method on one sculpt's examples; each figure is computed once and kept in `folder`."""

    def __init__(
        self,
        model: Callable[[], torch.nn.Module],
        given: Material,
        folder: Path,
        *,
        identity: dict[str, Any],  # of the base: figures of other examples, or another base, are thrown away
        own_dtype: torch.dtype | None = None,  # of weights that recovery trains, as they are stored
        num_calibration: int,  # training examples that the methods see, as many as the sculpt's initial scores
        prior: Prior | None = None,  # where recoveries may start, whichever mask they are of
        recovery_steps: Mapping[str, int] | None = None,  # by kind of recovery; the default's for those not named
        recovered: Collection[str] = RECOVERED,  # the methods that are recovered beside the learned mask
        num_seeds: int = 5,  # random masks
    ) -> None:
        self._build_model = model
        self._given = given
        self._folder = folder
        self._identity = identity | {
            "examples": examples_digest(given.train, given.validation, given.test),
            "num_calibration": num_calibration,
        }
        self._num_calibration = num_calibration
        self._own_dtype = own_dtype
        self._prior = prior
        self._recovery_steps = recovery_steps or {}
        self._recovered_methods = {OURS, *recovered}
        self._num_seeds = num_seeds
        self._directories: dict[str, Workdir] = {}
        self._built_masks: dict[tuple[str, int], Baseline] = {}  # by method and seed: one is recovered several times

    def figures(self, method: str, recovery: str) -> Figures | None:
        """One cell; None where the method is not recovered. Random masks are averaged over their seeds."""
        if recovery != "none":
            return self._cell(method, 0, recovery) if method in self._recovered_methods else None
        seeds = range(self._num_seeds if method == "random" else 1)
        cells = [self._cell(method, seed, recovery) for seed in seeds]
        return Figures(
            validation=np.mean([one.validation for one in cells], axis=0).tolist(),
            test=np.mean([one.test for one in cells], axis=0).tolist(),
            num_dropped=cells[0].num_dropped,
            seconds=sum(one.seconds for one in cells),
        )

    def _cell(self, method: str, seed: int, recovery: str) -> Figures:
        # Another learned mask leaves the other methods' figures as they are.
        name = f"{method}-{mask_digest(self._given.mask)[:12] if method == OURS else seed}"
        directory = self._directory(recovery)
        saved = directory.read_json(name)
        if saved is None:
            saved = asdict(self._computed(method, seed, recovery, directory.path / name))
            directory.write_json(name, saved)
            print(
                f"{self._folder.parent.name} {recovery} {name}: {saved['seconds']:.0f} s", file=sys.stderr, flush=True
            )
        return Figures(**saved)

    def _directory(self, recovery: str) -> Workdir:
        if recovery not in self._directories:
            name = recovery if recovery == "none" else f"{recovery}-{self._settings(recovery).steps}"
            self._directories[recovery] = Workdir(self._folder / name, self._identity | self._budget(recovery))
        return self._directories[recovery]

    def _computed(self, method: str, seed: int, recovery: str, scratch: Path) -> Figures:
        began = time.monotonic()
        built = self._built(method, seed)
        forward = built.forward
        if recovery != "none":
            unrecovered = float(np.mean(self._cell(method, seed, "none").validation))
            forward = self._recovered(built, recovery, unrecovered, scratch)
        validation, test = (held_out.divergence(forward).kl.tolist() for held_out in (self._validation, self._test))
        return Figures(validation, test, built.num_dropped, round(time.monotonic() - began, 1))

    def _built(self, method: str, seed: int) -> Baseline:
        if (method, seed) in self._built_masks:
            return self._built_masks[method, seed]
        mask = self._given.mask
        setting = Setting(self._model, self._calibration, self._kept, seed)
        built = (
            Baseline(masked(self._model, mask), setting.num_dropped, mask)
            if method == OURS
            else METHODS[method](setting)
        )
        if built.mask is not None:
            self._built_masks[method, seed] = built
        return built

    def _recovered(self, built: Baseline, recovery: Any, unrecovered: float, scratch: Path) -> Forward:
        assert built.mask is not None
        recovered = recover(
            self._model,
            built.mask,
            recovery,
            self._given.train,
            lambda forward: float(self._validation.divergence(forward).kl.mean()),
            self._settings(recovery),
            unrecovered=unrecovered,
            mean_activations=self._mean_activations,
            own_dtype=self._own_dtype,
            prior=self._prior,
            workdir=Workdir(scratch, self._identity | self._budget(recovery)),
        )
        forward: Forward = recovered.change.forward
        return forward

    def _budget(self, recovery: str) -> dict[str, Any]:
        if recovery == "none":
            return {}
        start = None if self._prior is None else self._prior.digest(self._kept, recovery)
        return {"recovery": asdict(self._settings(recovery)), "prior": start}

    def _settings(self, recovery: str) -> RecoverySettings:
        default = RecoverySettings()
        return replace(default, steps=self._recovery_steps.get(recovery, default.of(recovery).steps))

    @property
    def _kept(self) -> int:
        return int(self._given.mask[0].sum())

    @property
    def _calibration(self) -> list[Example]:
        return self._given.train[: self._num_calibration]

    @cached_property
    def _mean_activations(self) -> torch.Tensor:
        """Of the dense base, `[layers, intermediate]`."""
        return fluctuation(self._model, self._calibration).mean

    @cached_property
    def _model(self) -> torch.nn.Module:
        return self._build_model()

    @cached_property
    def _validation(self) -> HeldOut:
        return HeldOut(self._model, self._given.validation)

    @cached_property
    def _test(self) -> HeldOut:
        return HeldOut(self._model, self._given.test)


def main() -> None:
    """Sculpt or find, compare, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.workdir / "cache")
    prior = prior_of(base, options.workdir / "cache")
    model = cache(lambda: build_learner(base))
    cases = []
    for persona_id, name, text in personas(options.personas):
        for sparsity in options.sparsity:
            spec = SculptSpec(persona_id, name, text, sparsity=sparsity, preset=options.preset)
            result = sculpted(spec, base, options.workdir)
            comparison = Comparison(
                model,
                material(result),
                options.workdir / f"{persona_id}-{sparsity}" / "baselines",
                identity={"base": base.fingerprint},
                own_dtype=base.dtype,
                num_calibration=result.settings["num_importance"],
                prior=prior,
                recovery_steps=dict(options.recovery_steps),
                recovered=options.recovered,
                num_seeds=options.random_seeds,
            )
            for recovery in options.recoveries:
                for method in (OURS, *options.methods):
                    comparison.figures(method, recovery)
            cases.append(Case(persona_id, sparsity, comparison))
    table = "\n".join([*_head(), *tables(cases, options.methods, options.recoveries), ""])
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=["none"])
    parser.add_argument(
        "--recovered",
        nargs="*",
        choices=[one for one in METHODS if one in RECOVERED],
        default=[one for one in METHODS if one in RECOVERED],
        help="methods that are recovered beside the learned mask; default: all that give a mask",
    )
    parser.add_argument(
        "--recovery-steps",
        nargs="+",
        type=_steps_of_kind,
        default=[],
        metavar="KIND=STEPS",
        help="of a kind of recovery, whichever method's, such as full=8; default: as a sculpt's",
    )
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--workdir", type=Path, help="default: that of fidelity.py, or one of its own with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset, one persona, one sparsity, two seeds")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.random_seeds = "smoke", 2
        options.personas = (options.personas or ["pip"])[:1]
        options.sparsity = options.sparsity[:1]
    if options.workdir is None:
        options.workdir = usual_workdir(quick=options.quick)
    return options


def _steps_of_kind(text: str) -> tuple[str, int]:
    kind, _, steps = text.partition("=")
    if kind not in RECOVERIES[1:] or not steps.isdecimal() or int(steps) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(RECOVERIES[1:])}, =, and a number of steps"
        )
    return kind, int(steps)


def _head() -> list[str]:
    return [
        "# Beside every other method",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        "KL to the dense persona model in nats a token over the test questions, the mean over personas. *Closed* is",
        "what the learned mask closes of a method's KL, 1 - KL(ours) / KL(method), with its 95 % interval from a",
        "paired bootstrap over questions, nested in personas. Every method saw the same examples and drops as many",
        "parameters, as nearly as whole blocks (depth) and widths (SliceGPT) allow; every mask keeps the same number",
        "of neurons in every layer, FLAP's and LLM-Pruner's too. Recoveries of a column have one budget and the same",
        "starts to choose from on validation; random masks are the mean of several seeds without recovery, the first",
        "seed's with it. The strongest baseline is one of the methods shown.",
    ]


def tables(cases: Sequence[Case], methods: Sequence[str], recoveries: Sequence[str]) -> list[str]:
    """One table a sparsity, then ours against the strongest of each column, then the same by persona."""
    lines: list[str] = []
    sparsities = sorted({case.sparsity for case in cases})
    for sparsity in sparsities:
        lines += ["", *_methods_table([case for case in cases if case.sparsity == sparsity], methods, recoveries)]
    lines += ["", "Against the strongest baseline, chosen on validation for each persona:", ""]
    lines += header("sparsity", "recovery of ours", "of theirs", "personas", "KL ours", "KL strongest", "closed")
    pairs = _pairs(cases, methods, recoveries)
    for sparsity in sparsities:
        for of_ours, of_theirs in pairs:
            chosen = [case for case in cases if case.sparsity == sparsity]
            lines.append(_against_strongest(f"{sparsity:.0%}", chosen, methods, of_ours, of_theirs))
    lines += ["", *header("persona", "sparsity", "ours", "theirs", "strongest", "KL ours", "KL strongest", "closed")]
    for case in cases:
        for of_ours, of_theirs in pairs:
            strongest = _strongest(case, methods, of_theirs)
            ours, theirs = _test(case, OURS, of_ours), _test(case, strongest, of_theirs)
            kls = (f"{ours.mean():.3f}", f"{theirs.mean():.3f}")
            closed = _closed([ours], [theirs])
            lines.append(row(case.persona, f"{case.sparsity:.0%}", of_ours, of_theirs, strongest, *kls, closed))
    return lines


def _pairs(cases: Sequence[Case], methods: Sequence[str], recoveries: Sequence[str]) -> list[tuple[str, str]]:
    """Recoveries of ours and of theirs: the same, where any of theirs is recovered, and none of theirs."""
    same = [(one, one) for one in recoveries if any(cases[0].comparison.figures(method, one) for method in methods)]
    return [*same, *((one, "none") for one in recoveries if one != "none")]


def _methods_table(cases: Sequence[Case], methods: Sequence[str], recoveries: Sequence[str]) -> list[str]:
    columns = [column for recovery in recoveries for column in (f"KL, {recovery}", "closed")]
    lines = header(f"{cases[0].sparsity:.0%} dropped", "M parameters", *columns)
    for method in (OURS, *methods):
        cells: list[str] = []
        for recovery in recoveries:
            cells += _cells(cases, method, recovery)
        without = cases[0].comparison.figures(method, "none")
        assert without is not None
        lines.append(row(method, f"{without.num_dropped / 1e6:.2f}", *cells))
    return lines


def _cells(cases: Sequence[Case], method: str, recovery: str) -> tuple[str, str]:
    if cases[0].comparison.figures(method, recovery) is None:
        return "–", "–"
    theirs = [_test(case, method, recovery) for case in cases]
    kl = f"{np.mean([one.mean() for one in theirs]):.3f}"
    return kl, "" if method == OURS else _closed([_test(case, OURS, recovery) for case in cases], theirs)


def _against_strongest(
    sparsity: str, cases: Sequence[Case], methods: Sequence[str], of_ours: str, of_theirs: str
) -> str:
    ours = [_test(case, OURS, of_ours) for case in cases]
    theirs = [_test(case, _strongest(case, methods, of_theirs), of_theirs) for case in cases]
    kls = (f"{np.mean([one.mean() for one in side]):.3f}" for side in (ours, theirs))
    return row(sparsity, of_ours, of_theirs, str(len(cases)), *kls, _closed(ours, theirs))


def _strongest(case: Case, methods: Sequence[str], recovery: str) -> str:
    found = {method: case.comparison.figures(method, recovery) for method in methods}
    return strongest_baseline(
        {method: float(np.mean(figures.validation)) for method, figures in found.items() if figures is not None}
    )


def _test(case: Case, method: str, recovery: str) -> Values:
    figures = case.comparison.figures(method, recovery)
    assert figures is not None
    return np.array(figures.test)


def _closed(ours: Sequence[Values], theirs: Sequence[Values]) -> str:
    return percent(gap_closed(ours, theirs))


if __name__ == "__main__":
    main()
