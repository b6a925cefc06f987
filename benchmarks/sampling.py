"""What sampling costs a step, beside the step itself: milliseconds for one token of each of 16 sequences.

    python benchmarks/sampling.py --out benchmarks/results/sampling.md

Logits are the model's own, bf16, after every token of the example personas' texts; every case takes the same ones. The
cases run in turn, round after round, a few steps at a time. Sequences hold 200 tokens of prompt and 100 of output when
a round begins, and grow by what is sampled.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from masquerade_engine import PersonaFunction, Request, SamplingParams, load_base
from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.reference import reference_logits
from masquerade_engine.sampler import Sampler
from masquerade_engine.sequence import Sequence
from masquerade_engine.threads import available_cores

TEXTS = Path(__file__).parent.parent / "examples" / "personas"
WARM: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3}
CASES: dict[str, list[dict[str, Any]]] = {  # each row takes the next of its case's settings
    "greedy": [{"temperature": 0.0}],
    "temperature 0.8": [{"temperature": 0.8}],
    "temperature 0.8, top_p 0.95": [WARM],
    "temperature 0.8, top_p 0.95, top_k 40": [WARM | {"top_k": 40}],
    "temperature 0.8, min_p 0.05": [{"temperature": 0.8, "min_p": 0.05}],
    "temperature 0.8, top_p 0.95, all penalties": [WARM | PENALTIES],
    "greedy, all penalties": [{"temperature": 0.0} | PENALTIES],
    "greedy, logprobs 5": [{"temperature": 0.0, "logprobs": 5}],
    "temperature 0.8, top_p 0.95, logprobs 5": [WARM | {"logprobs": 5}],
    "mixed": [
        {"temperature": 0.0},
        {"temperature": 0.8},
        WARM,
        WARM | {"top_k": 40},
        {"temperature": 1.0, "min_p": 0.05},
        WARM | PENALTIES,
        WARM | {"logprobs": 5},
        {"temperature": 0.0, "logprobs": 5} | PENALTIES,
    ],
}


def model_logits(model: str, cache: Path, rows: int) -> list[torch.Tensor]:
    """The model's bf16 logits `[rows, vocab]` after the tokens of the example texts, as many batches as they fill."""
    base = load_base(model, cache_dir=cache, dtype="bf16", device="cpu")
    text = "\n\n".join(path.read_text("utf-8") for path in sorted(TEXTS.glob("*.txt")))
    tokens = base.tokenizer(text)["input_ids"][: base.context_length]
    logits = reference_logits(base.build_model(), torch.tensor([tokens]))[0]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    chosen = order[: len(order) // rows * rows].view(-1, rows)
    return list(logits[chosen])


def new_sequences(settings: list[dict[str, Any]], rows: int, vocab: int, rng: random.Random) -> list[Sequence]:
    made = []
    for row in range(rows):
        sampling = SamplingParams(max_tokens=10**6, seed=rng.randrange(2**31), **settings[row % len(settings)])
        prompt = tuple(rng.choices(range(vocab), k=200))
        request = Request(str(row), prompt, PersonaFunction("base:x", "bench"), sampling)
        sequence = Sequence(request, Detokenizer(lambda tokens: ""))
        sequence.tokens += rng.choices(range(vocab), k=100)
        made.append(sequence)
    return made


def steps(settings: list[dict[str, Any]], batches: list[torch.Tensor], count: int, seed: int) -> Iterator[float]:
    """Milliseconds of each of `count` steps; the first, which counts what was said before, is left out."""
    rows, vocab = batches[0].shape
    sequences = new_sequences(settings, rows, vocab, random.Random(seed))
    sampler = Sampler(frozenset({2}))
    for step in range(count + 1):
        logits = batches[(seed + step) % len(batches)]
        start = time.perf_counter()
        sampled = sampler.sample(logits, sequences)
        if step:
            yield 1e3 * (time.perf_counter() - start)
        for sequence, token in zip(sequences, sampled, strict=True):
            sequence.tokens.append(token.token_id)


def table(times: dict[str, list[float]], step_ms: float, rows: int, vocab: int) -> str:
    lines = [
        f"`python benchmarks/sampling.py` on {machine()}",
        "",
        f"One token for each of {rows} sequences from {vocab} logits: milliseconds, and the median's share of a step "
        f"of {step_ms:g} ms.",
        "",
        "| case | p50 | p90 | p99 | share |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in times.items():
        p50, p90, p99 = np.percentile(found, (50, 90, 99))
        lines.append(f"| {name} | {p50:.2f} | {p90:.2f} | {p99:.2f} | {p50 / step_ms:.1%} |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "masquerade")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps of a case in a round")
    parser.add_argument("--step-ms", type=float, default=35.0, help="what a step takes, for the shares")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="some of the cases")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    batches = model_logits(args.model, args.cache, args.rows)
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for name in args.only or CASES:
            times[name] += steps(CASES[name], batches, args.steps, number)
    text = table(times, args.step_ms, *batches[0].shape)
    print(text)
    if args.out:
        args.out.write_text(f"# Sampling\n\n{text}\n", "utf-8")


if __name__ == "__main__":
    main()
