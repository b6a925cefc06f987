"""Is a persona's own mask better for it than another persona's, and than the prior's that all of them started from?

    python benchmarks/own_masks.py --quick                           # minutes: two small sculpts, to try it
    python benchmarks/own_masks.py examples/personas/*.txt --out own_masks.md

Every persona is sculpted, or its sculpt found in the work directory, and every mask is put to every persona's test
questions: KL to the dense persona model in nats a token. Answers to one question under two masks are compared in pairs.
Each figure is kept in the work directory, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from machine import machine
from sculpts import examples_digest, mask_digest, material, personas, sculpted, usual_workdir
from tables import header, percent, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import Mask, round_kept, union
from masquerade_pruner import PRESETS, SculptSpec
from masquerade_pruner.bootstrap import Values, gap_closed
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.prior import prior_of
from masquerade_pruner.tree import masked
from masquerade_pruner.workdir import Workdir

PRIOR = "the prior"


@dataclass(frozen=True, slots=True)
class Cast:
    """Personas at one sparsity: their masks, and the prior's where the base has one."""

    sparsity: float
    masks: Mapping[str, torch.Tensor]  # [layers, intermediate] fp32, by persona; the prior's last
    kl: Mapping[tuple[str, str], Values]  # by persona and by whose mask: nats a token, question by question

    @property
    def names(self) -> list[str]:
        """The personas."""
        return [name for name in self.masks if name != PRIOR]

    def own(self, name: str) -> Values:
        """A persona under its own mask."""
        return self.kl[name, name]

    def others(self, name: str) -> Values:
        """... under the other personas', the mean of them for each question."""
        return np.mean([self.kl[name, other] for other in self.names if other != name], axis=0)  # type: ignore[no-any-return]


def measured(base: Base, specs: Sequence[SculptSpec], workdir: Path) -> Cast:
    """Sculpt or find, all at one sparsity, then put every mask to every persona's questions."""
    sparsity = specs[0].sparsity
    found = {spec.persona_id: material(sculpted(spec, base, workdir)) for spec in specs}
    masks = {name: one.mask for name, one in found.items()}
    prior = prior_of(base, workdir / "cache")
    if prior is not None:
        kept = round_kept(base.shape.intermediate_size, sparsity)
        masks[PRIOR] = top_k_mask(prior.at(kept), kept)
    model = build_learner(base)
    kl = {}
    for name, one in found.items():
        held_out = None
        asked = examples_digest(one.test)
        for whose, mask in masks.items():
            digest = mask_digest(mask)
            cell = Workdir(workdir / f"{name}-{sparsity}" / "own" / digest[:12], {"mask": digest, "test": asked})
            saved = cell.read_json("kl")
            if saved is None:
                held_out = held_out or HeldOut(model, one.test)
                saved = {"test": held_out.divergence(masked(model, mask)).kl.tolist()}
                cell.write_json("kl", saved)
                print(f"{name} under {whose}'s mask: {np.mean(saved['test']):.4f}", file=sys.stderr, flush=True)
            kl[name, whose] = np.array(saved["test"])
    return Cast(sparsity, masks, kl)


def table(cast: Cast) -> list[str]:
    """One sparsity: the personas, their mean, and how much the masks have in common."""
    names = cast.names
    columns = ["persona", "own", "others', mean", "best other", "own below others'"]
    columns += [PRIOR, f"own below {PRIOR}"] if PRIOR in cast.masks else []
    lines = [f"## {cast.sparsity:.0%} dropped", "", *header(*columns)]
    lines += [_line(cast, [name], name) for name in names]
    lines += [_line(cast, names, "mean")]
    masks = {name: Mask.from_dense(mask.bool().numpy()) for name, mask in cast.masks.items()}
    alike = np.mean([masks[one].jaccard(masks[other]) for one, other in combinations(names, 2)])
    said = f"Jaccard of two personas' masks {alike:.3f}"
    if PRIOR in masks:
        said += f", of one with the prior's {np.mean([masks[name].jaccard(masks[PRIOR]) for name in names]):.3f}"
    said += (
        f"; the {len(names)} keep {float(union(masks[name] for name in names).mean()):.3f} of all neurons between them."
    )
    return [*lines, "", said, ""]


def _line(cast: Cast, names: Sequence[str], title: str) -> str:
    own = [cast.own(name) for name in names]
    others = [cast.others(name) for name in names]
    best = [min(float(cast.kl[name, other].mean()) for other in cast.names if other != name) for name in names]
    cells = [title, _mean(own), _mean(others), f"{np.mean(best):.4f}", percent(gap_closed(own, others))]
    if PRIOR in cast.masks:
        prior = [cast.kl[name, PRIOR] for name in names]
        cells += [_mean(prior), percent(gap_closed(own, prior))]
    return row(*cells)


def _mean(values: Sequence[Values]) -> str:
    return f"{np.mean([one.mean() for one in values]):.4f}"


def main() -> None:
    """Sculpt or find, measure, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.workdir / "cache")
    cases = personas(options.personas)
    if len(cases) < 2:
        sys.exit("there is nobody to compare with: name at least two personas")
    lines = [
        "# Own masks",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        "KL to the dense persona model in nats a token over the test questions; *below* is 1 - KL(own) / KL(other)",
        "with its 95 % interval from a paired bootstrap over questions, nested in personas.",
        "",
    ]
    for sparsity in options.sparsity:
        specs = [SculptSpec(*case, sparsity=sparsity, preset=options.preset) for case in cases]
        lines += table(measured(base, specs, options.workdir))
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines), "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--workdir", type=Path, help="default: that of fidelity.py, or one of its own with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset, two personas, one sparsity")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.preset = "smoke"
        options.personas = (options.personas or ["pip", "marta-brewer"])[:2]
        options.sparsity = options.sparsity[:1]
    if options.workdir is None:
        options.workdir = usual_workdir(quick=options.quick)
    return options


if __name__ == "__main__":
    main()
