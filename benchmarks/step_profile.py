"""Where the time of one decoding step goes: kernels by kind, and what is left for Python and dispatch.

    python benchmarks/step_profile.py --streams 1 16 32
    python benchmarks/step_profile.py --streams 16 --quantization none int8 --out benchmarks/results/step_profile.md

Each kernel call is timed from Python inside real engine steps, so a call's own dispatch (2 to 4 us for a torch op,
under 1 us for a compiled loop) counts as kernel; `outside` is the step less all of these: scheduling, planning, Python
between the calls, and the timing itself (0.2 us a call).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import as_served, machine
from serving import CACHE_DIR
from town import random_subnetwork

from masquerade_engine import (
    Engine,
    EngineSettings,
    PersonaFunction,
    Request,
    SamplingParams,
    cpu_attention,
    load_base,
)
from masquerade_engine.sampler import Sampler
from masquerade_engine.threads import available_cores
from masquerade_kernels.linear import DotLinear, Int8Linear, PackedLinear
from masquerade_kernels.rows import CompiledRows

KINDS = ("linears", "attention", "rotary and KV write", "norms", "activation", "sampling")


class Clock:
    """Seconds by kind, summed over a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[kind] += time.perf_counter() - began

        return run


def instrument(clock: Clock) -> None:
    """Put the clock around every kernel call of the engine."""
    for linear in (DotLinear, PackedLinear, Int8Linear):
        linear.forward = clock.timed("linears", linear.forward)  # type: ignore[method-assign]
    # With the activation, where that is taken in one pass.
    DotLinear.gated = clock.timed("linears", DotLinear.gated)  # type: ignore[method-assign]
    CompiledRows.norm = clock.timed("norms", CompiledRows.norm)  # type: ignore[method-assign]
    CompiledRows.add_norm = clock.timed("norms", CompiledRows.add_norm)  # type: ignore[method-assign]
    CompiledRows.swiglu = clock.timed("activation", CompiledRows.swiglu)  # type: ignore[method-assign]
    attention = cpu_attention.CPUAttention
    attention._decode = clock.timed("attention", attention._decode)  # type: ignore[method-assign]
    attention._rotate_store = clock.timed("rotary and KV write", attention._rotate_store)  # type: ignore[method-assign]
    Sampler.sample = clock.timed("sampling", Sampler.sample)  # type: ignore[method-assign]


def main() -> None:
    """Run, print, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base(cache_dir=options.cache_dir)
    clock = Clock()
    instrument(clock)
    rows = []
    for quantization in options.quantization:
        settings = EngineSettings(max_num_seqs=max(options.streams), max_model_len=1024, quantization=quantization)
        with Engine(base, settings) as engine:
            for streams in options.streams:
                steps = measure(engine, clock, streams, options)
                rows.append(_row(quantization, streams, steps))
    table = _table(rows, options)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def measure(engine: Engine, clock: Clock, streams: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Each step's seconds by kind and in `step`, for steps in which every stream decodes and nothing else runs."""
    generator = np.random.default_rng(streams)
    sampling = SamplingParams(max_tokens=options.steps + 8, temperature=options.temperature, ignore_eos=True)
    for i in range(streams):
        prompt = tuple(int(token) for token in generator.integers(1000, 40000, options.context))
        persona = random_subnetwork(engine.base, 0.5, seed=i)
        engine.add(Request(f"{streams}-{i}", prompt, PersonaFunction(persona.digest, "town", persona), sampling))
    while sum(output.finish_reason is None for output in engine.step()) < streams:
        pass
    steps = []
    for _ in range(options.steps):
        clock.seconds.clear()
        began = time.perf_counter()
        engine.step()
        steps.append({**clock.seconds, "step": time.perf_counter() - began})
    while engine.has_work:
        engine.step()
    return steps


def _row(quantization: str, streams: int, steps: list[dict[str, float]]) -> str:
    def cell(kind: str) -> str:
        values = 1000 * np.array([step.get(kind, 0.0) for step in steps])
        return f"{np.median(values):.2f}"

    outside = 1000 * np.array([step["step"] - sum(step.get(kind, 0.0) for kind in KINDS) for step in steps])
    whole = 1000 * np.array([step["step"] for step in steps])
    p50, p90 = np.percentile(whole, [50, 90])
    cells = [cell(kind) for kind in KINDS]
    share = np.median(outside) / np.median(whole)
    return "| " + " | ".join(
        [quantization, str(streams), f"{p50:.1f}", f"{p90:.1f}", *cells, f"{np.median(outside):.2f}", f"{share:.0%}"]
    ) + " |"  # fmt: skip


def _table(rows: list[str], options: argparse.Namespace) -> str:
    head = ["quantization", "streams", "step p50", "p90", *KINDS, "outside", "share outside"]
    return "\n".join(
        [
            "# One decoding step",
            "",
            f"`python benchmarks/step_profile.py` on {machine()}",
            "",
            f"Milliseconds, medians of {options.steps} steps; every stream a persona of its own at 50 %; context from",
            f"{options.context} to {options.context + options.steps} tokens, temperature {options.temperature:g}.",
            "",
            "| " + " | ".join(head) + " |",
            "|" + " --- |" * len(head),
            *rows,
            "",
        ]
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8"), default=["none", "int8"])
    parser.add_argument("--context", type=int, default=232, help="tokens of prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    as_served()
    main()
