"""A learning step and a pass over validation: in bf16 and float32, with known dense states and without, in turn.

    python benchmarks/learning_step.py --out benchmarks/results/learning_step.md

The bundled model at 25 %, steps and batches of 16 branches of a default sculpt's lengths; which tokens they hold makes
no difference. A sculpt takes what `learning_dtype` says, and the states that came with its answers.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from machine import as_served, machine
from serving import CACHE_DIR
from tables import header, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import round_kept
from masquerade_pruner.changes import Change
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import averaged_ranks
from masquerade_pruner.learner import learning_dtype
from masquerade_pruner.mask_learning import MaskLearner, top_k_mask
from masquerade_pruner.prior import prior_of

PROMPT, QUESTION, ANSWER, BRANCHES = 170, 35, 62, 16
WORK = ("step", "validation")

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Way:
    """How a sculpt could learn."""

    dtype: torch.dtype
    known: bool  # the dense states of its answers

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, dense states {'known' if self.known else 'computed'}"


def main() -> None:
    """Take turns, print, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base(options.model, cache_dir=options.cache_dir)
    taken = timed({way: runs(base, way, options.cache_dir) for way in ways()}, options.turns)
    lines = [
        "# A learning step",
        "",
        f"`python benchmarks/learning_step.py` on {machine()}",
        "",
        f"Seconds, {options.turns} of each in random order, of 16 branches: a step there and back, and a batch of the",
        f"validation questions. *Ratio*: p50 over the first row's. A sculpt learns here in {_type_of(base)}.",
        "",
        *header("way", *(cell for work in WORK for cell in (f"{work}, p50", "p10 to p90", "ratio"))),
    ]
    slowest = {work: float(np.median(seconds)) for work, seconds in taken[ways()[0]].items()}
    for way, by_work in taken.items():
        cells = [cell for work in WORK for cell in _cells(by_work[work], slowest[work])]
        lines.append(row(way.name, *cells))
    table = "\n".join([*lines, ""])
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def ways() -> list[Way]:
    """All, the one with most work first."""
    return [Way(dtype, known) for dtype in (torch.bfloat16, torch.float32) for known in (False, True)]


def runs(base: Base, way: Way, cache_dir: Path) -> dict[str, Run]:
    """A step, and validation of a batch."""
    model = base.build_model().to(way.dtype)
    kept = round_kept(base.shape.intermediate_size, 0.25)
    prior = prior_of(base, cache_dir)
    scores = torch.rand(base.shape.num_layers, base.shape.intermediate_size) if prior is None else prior.at(kept)
    ranks = averaged_ranks(scores)
    learner = MaskLearner(model, ranks, kept, steps=1000, learning_rate=1e-3, dropped_alone=True)
    examples = branches(base, known=way.known)
    forward = Change.of_mask(model, top_k_mask(ranks, kept)).forward
    return {
        "step": lambda: learner.step(examples),
        "validation": lambda: HeldOut(model, examples).divergence(forward),
    }


def branches(base: Base, *, known: bool) -> list[Example]:
    """A step's examples: a quarter have an earlier turn."""
    rng = random.Random(0)
    tokens = range(base.config.vocab_size)
    prompt, made = rng.choices(tokens, k=PROMPT), []
    for number in range(BRANCHES):
        own = rng.choices(tokens, k=QUESTION + (QUESTION + ANSWER if number % 4 == 0 else 0))
        answer = tuple(rng.choices(tokens, k=ANSWER))
        states = torch.randn(ANSWER, base.shape.hidden_size).to(base.dtype) if known else None
        made.append(Example(str(number), "", "", "train", "", "", None, (*prompt, *own), answer, ended=False))
        made[-1] = replace(made[-1], dense_states=states)
    return made


def timed(runs: dict[Way, dict[str, Run]], turns: int) -> dict[Way, dict[str, list[float]]]:
    """Seconds of every call; ways take turns in random order."""
    taken: dict[Way, dict[str, list[float]]] = {way: {work: [] for work in WORK} for way in runs}
    for turn in range(turns + 1):
        for way in random.sample(list(runs), len(runs)):
            for work, run in runs[way].items():
                began = time.perf_counter()
                run()
                if turn:  # the first one compiles
                    taken[way][work].append(time.perf_counter() - began)
    return taken


def _type_of(base: Base) -> str:
    return str(learning_dtype(base)).removeprefix("torch.")


def _cells(seconds: Sequence[float], slowest: float) -> tuple[str, str, str]:
    low, middle, high = np.percentile(seconds, [10, 50, 90])
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{middle / slowest:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    as_served()
    main()
