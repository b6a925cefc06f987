"""Decoding steps on a GPU: eager against CUDA graphs, in turn, on one engine.

    python benchmarks/decode_graphs.py --model ~/models/Llama-3.2-3B-Instruct --out benchmarks/results/decode_graphs.md

*mixed* streams are of a persona each, so they share the dense pack (there is no room for others); *one* persona's
streams run on its gathered pack where the engine found that to pay, and the table says which it was. A step is the
engine's whole step, sampling and scheduling included. Without a GPU it exits with code 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gathered_ffn import device_line
from serving import CACHE_DIR
from town import random_subnetwork

from masquerade_engine import Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base
from masquerade_engine.base import BUNDLED

NO_GPU = "decode_graphs.py measures a CUDA GPU, and torch finds none here."
WARM_UP = 3  # steps of a kind: wanted once, captured, replayed
PACK_WAIT_S = 60.0
COLUMNS = ("personas", "rows", "pack", "eager ms", "graph ms", "eager tokens/s", "graph tokens/s", "ratio")


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    base = load_base(options.model, cache_dir=options.cache_dir, device="cuda")
    lines = [
        "# Decoding steps, eager and as CUDA graphs\n",
        f"`python benchmarks/decode_graphs.py --model {options.model}` on {device_line()}\n",
        f"{base.dtype}, contexts from {options.context} tokens on; medians of {options.rounds} rounds of "
        f"{options.steps} steps of either kind in turn. *ratio* is eager over graph.\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for personas, megabytes in (("mixed", 0), ("one", 512)):
        settings = EngineSettings(
            max_num_seqs=max(options.rows), max_model_len=options.max_len, pack_cache_bytes=megabytes << 20
        )
        with Engine(base, settings) as engine:
            for rows in options.rows:
                lines.append(measure(engine, personas, rows, options))
                print(lines[-1], flush=True)
    report = "\n".join(lines)
    print(report)
    if options.out is not None:
        options.out.write_text(report + "\n", "utf-8")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=260, help="tokens of prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of one kind at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds a converted base")
    parser.add_argument("--out", type=Path, help="write the report there as Markdown")
    options = parser.parse_args()
    # The first streams write while the last ones' prompts are read.
    options.num_tokens = 2 * (WARM_UP + options.rounds * options.steps + max(options.rows)) + 8
    options.max_len = options.context + options.num_tokens
    return options


def measure(engine: Engine, personas: str, rows: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    add_streams(engine, personas, rows, options)
    eager: list[float] = []
    graph: list[float] = []
    with eagerly(engine) as switch:
        for kind in (True, False):
            switch(kind)
            times(engine, WARM_UP)
        for _ in range(options.rounds):
            switch(True)
            eager += times(engine, options.steps)
            switch(False)
            graph += times(engine, options.steps)
    members = engine.runner._plan.segments[0].pack.members
    while engine.has_work:
        engine.step()
    slow, fast = 1000 * float(np.median(eager)), 1000 * float(np.median(graph))
    cells = (personas, str(rows), "dense" if members is None else "gathered", f"{slow:.2f}", f"{fast:.2f}")
    return (
        "| "
        + " | ".join([*cells, f"{1000 * rows / slow:.0f}", f"{1000 * rows / fast:.0f}", f"{slow / fast:.2f}"])
        + " |"
    )


def add_streams(engine: Engine, personas: str, rows: int, options: argparse.Namespace) -> None:
    """So many requests, each past its first token."""
    generator = np.random.default_rng(rows)
    sampling = SamplingParams(max_tokens=options.num_tokens, temperature=0.8, ignore_eos=True)
    for i in range(rows):
        subnetwork = random_subnetwork(engine.base, 0.5, seed=i if personas == "mixed" else 0)
        prompt = tuple(int(token) for token in generator.integers(0, engine.base.config.vocab_size, options.context))
        function = PersonaFunction(subnetwork.digest, "town", subnetwork)
        engine.add(Request(f"{rows}-{i}", prompt, function, sampling))
    deadline = time.monotonic() + PACK_WAIT_S
    while personas == "one" and engine.residency(function.digest) != "compact" and time.monotonic() < deadline:
        time.sleep(0.05)
    while engine.scheduler.num_waiting or engine.runner._plan.personas is None:
        engine.step()


@contextmanager
def eagerly(engine: Engine) -> Iterator[Callable[[bool], None]]:
    """A switch between eager steps and graphs."""
    graphs = engine.runner._graphs
    assert graphs is not None
    run = graphs.run

    def switch(eager: bool) -> None:
        graphs.run = (lambda *_: None) if eager else run  # type: ignore[method-assign]

    yield switch
    switch(False)


def times(engine: Engine, steps: int) -> list[float]:
    """Seconds of each; a step ends with its tokens on the host."""
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - began)
    return found


if __name__ == "__main__":
    sys.exit(main())
