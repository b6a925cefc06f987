"""The engine alone, no HTTP: output tokens/s, TTFT and ITL at several numbers of streams.

    python benchmarks/engine_throughput.py --streams 1 16 32 --personas base distinct one

Every stream has a persona prompt of about 170 tokens, its own question of about 30 and 64 tokens to write. Masks are
random, made for the run; `cold` computes every prompt, `warmed` has each persona's prompt in the prefix cache.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from masquerade_engine import (
    Base,
    Engine,
    EngineSettings,
    PersonaFunction,
    Request,
    SamplingParams,
    load_base,
)
from masquerade_masks import Mask, SubNetwork, round_kept


def personas(base: Base, kind: str, count: int, sparsity: float) -> list[PersonaFunction]:
    """`base`: no mask; `one`: one mask for all streams; `distinct`: a mask of its own for each."""
    if kind == "base":
        return [PersonaFunction(f"base:{base.fingerprint}", f"cast-{i}") for i in range(count)]
    made = [random_subnetwork(base, sparsity, seed) for seed in range(1 if kind == "one" else count)]
    return [PersonaFunction(made[i % len(made)].digest, "bench", made[i % len(made)]) for i in range(count)]


def random_subnetwork(base: Base, sparsity: float, seed: int) -> SubNetwork:
    shape = base.shape
    kept = round_kept(shape.intermediate_size, sparsity)
    scores = np.random.default_rng(seed).random((shape.num_layers, shape.intermediate_size))
    return SubNetwork(
        base.fingerprint, shape, Mask.from_kept_indices(scores.argsort(axis=1)[:, :kept], shape.intermediate_size)
    )


def requests(functions: list[PersonaFunction], args: argparse.Namespace, run: int, vocab: int) -> list[Request]:
    made = []
    for i, function in enumerate(functions):
        prefix = random.Random(f"{function.digest}{function.cast}{len(functions)}").choices(
            range(1000, vocab), k=args.prompt
        )
        question = random.Random(f"{run}/{i}").choices(range(1000, vocab), k=args.question)
        sampling = SamplingParams(max_tokens=args.tokens, temperature=args.temperature, ignore_eos=True)
        made.append(Request(f"{run}/{i}", tuple(prefix + question), function, sampling))
    return made


def measure(engine: Engine, batch: list[Request]) -> dict[str, float]:
    start = time.perf_counter()
    for request in batch:
        engine.add(request)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    busy: dict[str, float] = defaultdict(float)
    num_tokens = 0
    while engine.has_work:
        began = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        busy["steps"] += now - began
        for output in outputs:
            num_tokens += 1
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            first.setdefault(output.request_id, now - start)
            last[output.request_id] = now
    seconds = time.perf_counter() - start
    decode_gaps = sorted(gaps)
    return {
        "tokens/s": num_tokens / seconds,
        "ttft p50 ms": 1e3 * percentile(sorted(first.values()), 0.5),
        "ttft p99 ms": 1e3 * percentile(sorted(first.values()), 0.99),
        "itl p50 ms": 1e3 * percentile(decode_gaps, 0.5),
        "itl p90 ms": 1e3 * percentile(decode_gaps, 0.9),
        "itl p99 ms": 1e3 * percentile(decode_gaps, 0.99),
        "decode tokens/s": len(batch) / percentile(decode_gaps, 0.5),
    }


def percentile(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "masquerade")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--personas", nargs="+", default=["base", "distinct", "one"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=170, help="tokens of persona prompt")
    parser.add_argument("--question", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    base = load_base(args.model, cache_dir=args.cache, dtype=args.dtype)
    print(f"{base.name} {base.dtype} on {base.device}, {args.threads} threads, torch {torch.__version__}")
    settings = EngineSettings(max_num_seqs=max(args.streams), max_queue=max(args.streams), max_model_len=1024)
    with Engine(base, settings) as engine:
        for kind in args.personas:
            for streams in args.streams:
                functions = personas(base, kind, streams, args.sparsity)
                wait_for_packs(engine, functions, kind)
                runs = []
                for run in range(args.repeats + 1):
                    figures = measure(engine, requests(functions, args, run, base.config.vocab_size))
                    report("cold" if run == 0 else "warmed", kind, streams, figures) if run == 0 else runs.append(
                        figures
                    )
                report("warmed", kind, streams, {key: statistics.median(r[key] for r in runs) for key in runs[0]})


def wait_for_packs(engine: Engine, functions: list[PersonaFunction], kind: str) -> None:
    if kind == "one":
        engine.install(functions[0])
        while engine.residency(functions[0].digest) != "compact":
            time.sleep(0.05)


def report(state: str, kind: str, streams: int, figures: dict[str, float]) -> None:
    print(
        f"{kind:9} {streams:3} streams {state:7}",
        *(f"{key} {value:7.1f}" for key, value in figures.items()),
        flush=True,
    )


if __name__ == "__main__":
    main()
