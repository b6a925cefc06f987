"""What masks cost and gain in decoding, step beside step: engines of one process take turns, one step each.

    python benchmarks/gains.py --out benchmarks/results/gains.md

The machine's speed may wander by a tenth within seconds, which is more than a cast gains. Here each configuration has
an engine of its own with the same 16 prompts, of about 170 tokens of persona and 30 of question, and all of them decode
at once: a step of the first, a step of the second, and so on, in an order drawn anew for every turn. Steps of one turn
are compared, summed over stretches of 16, with a bootstrap over stretches.

base: the unpruned base. distinct: 16 personas with masks of their own at 50 %. cast: 16 whose masks keep 50 % each and
65 % together. one: one persona at 50 % in all streams. The gain predicted for a mask is 1 / (1 - share x (1 - kept)),
from the share that the FFNs have of the base's own steps, timed within them. Packs are made before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from intervals import paired_ratio
from machine import as_served, machine
from serving import CACHE_DIR
from town import character, overlapping_subnetworks, prompt, random_subnetwork, union_share

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base, runner
from masquerade_engine.threads import available_cores
from masquerade_kernels import run_persona_ffn
from masquerade_masks import SubNetwork

STRETCH = 16  # turns
SPARSITY, TOGETHER = 0.5, 0.35
_PATIENCE_S = 60.0
_STREAMS = 16


@dataclass(slots=True)
class Contender:
    """One configuration with its engine."""

    name: str
    streams: int
    engine: Engine
    functions: Sequence[PersonaFunction]  # of the streams
    prompts: Sequence[Sequence[int]]
    seconds: list[float] = field(default_factory=list)  # of each step that was timed

    def begin(self, number: int, tokens: int) -> None:
        """Bring all streams to their first token."""
        sampling = SamplingParams(max_tokens=tokens + 4, temperature=0.0, ignore_eos=True)
        for stream in range(self.streams):
            name = f"{number}/{stream}"
            self.engine.add(Request(name, tuple(self.prompts[stream]), self.functions[stream], sampling))
        started: set[str] = set()
        while len(started) < self.streams:
            started |= {output.request_id for output in self.engine.step() if output.token_id is not None}

    def step(self) -> None:
        """One timed step."""
        began = time.perf_counter()
        self.engine.step()
        self.seconds.append(time.perf_counter() - began)

    def finish(self) -> None:
        """Let the streams end."""
        while self.engine.has_work:
            self.engine.step()

    def settle(self) -> None:
        """Let the packs that the personas want be made."""
        packs = self.engine.runner.packs
        until = time.monotonic() + _PATIENCE_S
        still = 0
        known: tuple[str, ...] = ()
        while still < 20 and time.monotonic() < until:
            time.sleep(0.25)
            now = tuple(sorted(packs.resident.packs))
            still = still + 1 if now == known else 0
            known = now

    def packs(self) -> str:
        """What is resident."""
        names = list(self.engine.runner.packs.resident.packs)
        casts = sum(name.startswith("cast:") for name in names)
        return f"{casts} cast, {len(names) - casts} compact"


def main() -> None:
    """Warm, take turns, print, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base(cache_dir=options.cache_dir)
    with ExitStack() as engines:
        many, single = contenders(base, engines)
        for group in (many, single):
            run(group, options)
        table = _table(many, single, options)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def contenders(base: Base, engines: ExitStack) -> tuple[list[Contender], list[Contender]]:
    """Those with 16 streams, and those with one; the base first."""
    prompts = [prompt(base, character(base, seed), seed) for seed in range(_STREAMS)]
    distinct = [random_subnetwork(base, SPARSITY, seed) for seed in range(_STREAMS)]
    cast = overlapping_subnetworks(base, SPARSITY, TOGETHER, _STREAMS, seed=1)

    def made(name: str, streams: int, subnetworks: Sequence[SubNetwork | None]) -> Contender:
        engine = engines.enter_context(Engine(base, EngineSettings(max_num_seqs=_STREAMS, max_model_len=1024)))
        functions = [
            PersonaFunction(f"base:{base.fingerprint}" if one is None else one.digest, "town", one)
            for one in subnetworks
        ]
        return Contender(name, streams, engine, functions, prompts)

    many = [
        made("base", _STREAMS, [None] * _STREAMS),
        made("distinct", _STREAMS, distinct),
        made("cast", _STREAMS, cast),
        made("one", _STREAMS, [distinct[0]] * _STREAMS),
    ]
    return many, [made("base", 1, [None]), made("one", 1, [distinct[0]])]


def run(group: Sequence[Contender], options: argparse.Namespace) -> None:
    """Warm everyone up, then take turns."""
    rng = random.Random(0)
    for number in range(-2, options.rounds):
        for one in group:
            one.begin(number, options.tokens)
        for _ in range(options.tokens if number >= 0 else 4):
            for one in rng.sample(list(group), len(group)):
                one.step()
        for one in group:
            one.finish()
            if number < 0:
                one.settle()
                one.seconds.clear()


def ffn_share(base: Contender, tokens: int) -> float:
    """The share that the FFNs have of the base's steps: the median of a round."""
    shares: list[float] = []
    inside = [0.0]

    def timed(*arguments: Any, **named: Any) -> torch.Tensor:
        began = time.perf_counter()
        found = run_persona_ffn(*arguments, **named)
        inside[0] += time.perf_counter() - began
        return found

    base.begin(1_000_000, tokens)
    with mock.patch.object(runner, "run_persona_ffn", timed):
        for _ in range(tokens):
            inside[0] = 0.0
            began = time.perf_counter()
            base.engine.step()
            shares.append(inside[0] / (time.perf_counter() - began))
    base.finish()
    return float(np.median(shares))


def stretches(one: Contender) -> list[float]:
    """Seconds of every stretch of steps."""
    whole = len(one.seconds) // STRETCH * STRETCH
    return [float(part) for part in np.array(one.seconds[:whole]).reshape(-1, STRETCH).sum(axis=1)]


def _table(many: Sequence[Contender], single: Sequence[Contender], options: argparse.Namespace) -> str:
    lines = [
        "# What masks cost and gain, step beside step",
        "",
        f"`python benchmarks/gains.py` on {machine()}",
        "",
        f"{options.rounds} rounds of {options.tokens} turns; greedy, contexts from about 210 tokens on; each engine's",
        "steps are compared with the base's of the same turns.",
        "",
        "| streams | personas | step p50, ms | p90 | over the base | 95 % interval | predicted | of the gain | packs |",
        "|" + " --- |" * 9,
    ]
    for group in (many, single):
        share = ffn_share(group[0], options.tokens)
        for one in group:
            kept = _kept(one)
            ratio = paired_ratio(stretches(group[0]), stretches(one))
            predicted = 1 / (1 - share * (1 - kept))
            gain = f"{(ratio.mean - 1) / (predicted - 1):.0%}" if predicted > 1.02 else ""
            p50, p90 = (1000 * value for value in np.percentile(one.seconds, (50, 90)))
            lines.append(
                f"| {one.streams} | {one.name} | {p50:.1f} | {p90:.1f} | {ratio.mean:.3f} "
                f"| {ratio.low:.3f} to {ratio.high:.3f} | {predicted:.3f} | {gain} | {one.packs()} |"
            )
        lines.append(f"| {group[0].streams} | the FFNs: {share:.0%} of the base's step |" + " |" * 7)
    return "\n".join([*lines, ""])


def _kept(one: Contender) -> float:
    """The share of the neurons that the streams' masks keep together."""
    subnetworks = [function.subnetwork for function in one.functions if function.subnetwork is not None]
    return union_share(subnetworks) if subnetworks else 1.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="turns in each round (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    as_served()
    main()
