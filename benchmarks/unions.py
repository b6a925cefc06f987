"""How many neurons a cast's masks keep between them, learned alone and pulled together, and what the pull costs in KL.

    python benchmarks/unions.py --quick                      # minutes: two small sculpts, to try it
    python benchmarks/unions.py --sparsity 0.25              # 8 personas: some 40 minutes, two cores
    python benchmarks/unions.py --personas 24 --pull 0.05 0.1 0.2 --out unions.md

The personas of benchmarks/casts/village.json are sculpted in their order from one set of answers each: *alone*, and
*pulled* towards the pulled masks of those before. KL to the dense persona model is read on validation and on test. Of
several pulls validation chooses one for all sparsities: that of the smallest union of those that cost at most 3 % more
KL at each. So that a cast fits an evening, sculpts are short: few steps, few questions, nothing free-running; the
tables say how few. Each mask is kept in the work directory: a killed run goes on where it was, and `--out` is written
anew after every persona.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from machine import machine
from sculpts import Personas, sculpted
from tables import header, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import Mask, chance_jaccard, round_kept, union
from masquerade_pruner import PRESETS, SculptSettings, SculptSpec
from masquerade_pruner.bootstrap import Interval, Values, gap_closed
from masquerade_pruner.instructions import load_instructions
from masquerade_pruner.prior import Prior, prior_of
from masquerade_pruner.workdir import Workdir

VILLAGE = Path(__file__).parent / "casts" / "village.json"
STEPS = 16
QUESTIONS = 48  # of validation, and of test
NUM_IMPORTANCE = 16  # examples
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


class Run:
    """How every mask is learned, each once, and kept in `workdir`."""

    def __init__(self, base: Base, settings: SculptSettings, workdir: Path, instructions: Path | None = None) -> None:
        self._base = base
        self._settings = settings
        self._workdir = workdir
        self._instructions = instructions
        self.prior = prior_of(base, workdir / "cache")
        self._identity = {
            "base": base.fingerprint,
            "dtype": str(base.dtype),
            "instructions": load_instructions(instructions).digest,
        }

    def add(self, persona: tuple[str, str, str], cast: Cast) -> None:
        """Learn one more persona's masks, the pulled ones towards those that the cast has."""
        alone = self._learned(persona, cast.sparsity, 0.0, [])
        for pull, before in cast.pulled.items():
            masks = [one.mask for one in before]
            before.append(self._learned(persona, cast.sparsity, pull, masks) if masks else alone)
        cast.alone.append(alone)

    def _learned(self, persona: tuple[str, str, str], sparsity: float, pull: float, towards: Sequence[Mask]) -> Learned:
        persona_id, name, text = persona
        numbers = replace(self._settings, cast_pull=pull)
        spec = SculptSpec(persona_id, name, text, sparsity=sparsity, numbers=numbers, instructions=self._instructions)
        identity = self._identity | {
            "persona": persona,
            "sparsity": sparsity,
            "prior": self.prior and self.prior.digest(round_kept(self._base.shape.intermediate_size, sparsity)),
            "settings": asdict(numbers),
            "cast": [hashlib.sha256(one.bits.tobytes()).hexdigest() for one in towards],
        }
        # Named by all that it depends on: a sculpt's own directory does not know its cast.
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        folder = f"{persona_id}-{sparsity}-{pull}-{digest[:12]}"
        cell = Workdir(self._workdir / folder, {"digest": digest})
        figures, mask = cell.read_json("figures"), cell.read_tensors("mask")
        if figures is None or mask is None:
            result = sculpted(spec, self._base, self._workdir, name=folder, cast=towards)
            figures = {
                "validation": min(kl for _, kl in result.report["learning"]["validation_kl"]),
                "test": result.report["one_turn"]["per_question"]["kl"],
            }
            mask = {"mask": torch.from_numpy(result.subnetwork.mask.to_dense())}
            cell.write_tensors("mask", mask)
            cell.write_json("figures", figures)
        return Learned(Mask.from_dense(mask["mask"].numpy()), figures["validation"], np.array(figures["test"]))


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
        for cast in casts:
            run.add(persona, cast)
        if options.out and count > 1:
            options.out.write_text(_page(casts, people[:count], settings, run.prior), "utf-8")
    print(_page(casts, people, settings, run.prior))


def village() -> Personas:
    """The cast, in the order in which it is sculpted."""
    return [(one["id"], one["name"], one["text"]) for one in json.loads(VILLAGE.read_text("utf-8"))]


def short(settings: SculptSettings, steps: int | None) -> SculptSettings:
    """A preset's numbers with fewer steps and questions, and nothing but KL on single turns measured."""
    return replace(
        settings,
        steps=min(settings.steps, STEPS) if steps is None else steps,
        num_importance=min(settings.num_importance, NUM_IMPORTANCE),
        num_validation=min(settings.num_validation, QUESTIONS),
        num_test=min(settings.num_test, QUESTIONS),
        num_test_scenes=0,
        num_free_running=0,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=8, help="the first so many of the village (%(default)s)")
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


def _page(casts: Sequence[Cast], people: Personas, settings: SculptSettings, prior: Prior | None) -> str:
    start = "Wanda's and Fisher's averaged ranks: this base has no prior yet" if prior is None else "the base's prior"
    lines = [
        "# What a cast's masks keep between them",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"The first {len(people)} personas of the village. Short sculpts, {settings.steps} steps of",
        f"{settings.branches_per_step} branches, from {start};",
        f"{settings.num_validation} validation and {settings.num_test} test questions a persona, single turns, nothing",
        "free-running. *Union* is the share of neurons that any of the masks keeps, the mean over layers; *unrelated*",
        "masks of share k have 1 - (1 - k)^n. *Pulled* masks were learned towards the pulled masks before them. KL to",
        "the dense persona model in nats a token; *over alone* is the mean over personas of KL pulled / KL alone, all",
        "but the first, who has nobody to be pulled towards, with its 95 % interval from a paired bootstrap over",
        f"questions, nested in personas. A pull may cost {LIMIT - 1:.0%} on validation at each sparsity; of those that",
        "may, the smallest union is chosen.",
        "",
        *tables(casts, [name for _, name, _ in people]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
