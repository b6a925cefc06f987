"""What learning runs between its matrix products: torch's operations and the compiled loops, in turn.

    python benchmarks/learning_loops.py --out benchmarks/results/learning_loops.md

Sizes are those of a step on SmolLM2-135M: 16 branches of some 100 tokens behind a prompt of 170. Way there and way back
are timed together, but for the top-1 agreement, which has none. Needs a CPU; on others learning runs torch.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import as_served, machine
from tables import header, row
from torch.nn import functional as F

from masquerade_engine.threads import available_cores
from masquerade_kernels.differentiable import attention, gated, norm
from masquerade_kernels.divergence import divergence, divergence_and_gradient

TOKENS, HIDDEN, NEURONS, VOCABULARY = 1_830, 576, 1_536, 49_152
ROWS = 128  # of logits at a time
BRANCHES, HEADS, HEAD_DIM, PROMPT, LONGEST = 16, 3, 64, 170, 106  # three query heads share a key and are folded

Run = Callable[[], object]


def main() -> None:
    """Take turns, print, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = [
        "# Learning's loops",
        "",
        f"`python benchmarks/learning_loops.py` on {machine()}",
        "",
        f"Milliseconds a call in bf16, {options.turns} turns of each in random order; *ratio*: torch's p50 over ours.",
        "",
        *header("operation", "torch, p50", "p10 to p90", "ours, p50", "p10 to p90", "ratio"),
    ]
    for name, pair in operations().items():
        plain, ours = timed(pair, options.turns)
        cells = [cell for taken in (plain, ours) for cell in _cells(taken)]
        lines.append(row(name, *cells, f"{np.median(plain) / np.median(ours):.1f}"))
    table = "\n".join([*lines, ""])
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def operations() -> dict[str, tuple[Run, Run]]:
    """By name, torch's way and ours."""
    target, predicted = torch.randn(2, ROWS, VOCABULARY).bfloat16()
    weights = torch.rand(ROWS)
    query = _leaf(BRANCHES, HEADS, 3 * LONGEST, HEAD_DIM)
    key, value = (_leaf(BRANCHES, HEADS, PROMPT + LONGEST, HEAD_DIM) for _ in range(2))
    later = torch.ones(LONGEST, LONGEST, dtype=torch.bool).triu(1)
    sees = torch.cat([torch.zeros(LONGEST, PROMPT, dtype=torch.bool), later], dim=1)
    bias = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(sees, float("-inf"))
    bias = bias.repeat(3, 1).expand(BRANCHES, 1, -1, -1).contiguous()
    gate, up = (_leaf(1, TOKENS, NEURONS) for _ in range(2))
    mask = (torch.rand(NEURONS) > 0.25).float().requires_grad_()
    stream, scale = _leaf(1, TOKENS, HIDDEN), torch.randn(HIDDEN).bfloat16()
    return {
        "KL, its gradient": (
            lambda: _plain_divergence(target, predicted, weights),
            lambda: divergence_and_gradient(target, predicted.clone(), weights),
        ),
        "KL, top-1 agreement": (
            lambda: (_plain_kl(target, predicted), target.argmax(-1) == predicted.argmax(-1)),
            lambda: divergence(target, predicted),
        ),
        "attention of the branches": (
            _there_and_back(
                lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.125),
                query,
                key,
                value,
            ),
            _there_and_back(lambda: attention(query, key, value, bias, 0.125), query, key, value),
        ),
        "gated activation": (
            _there_and_back(lambda: (F.silu(gate) * up).float().mul(mask).bfloat16(), gate, up, mask),
            _there_and_back(lambda: gated(gate, up, mask), gate, up, mask),
        ),
        "norm": (
            _there_and_back(lambda: F.rms_norm(stream, (HIDDEN,), scale, 1e-5), stream),
            _there_and_back(lambda: norm(stream, scale, 1e-5), stream),
        ),
    }


def timed(pair: tuple[Run, Run], turns: int) -> tuple[list[float], list[float]]:
    """Milliseconds of every call of both, which take turns in random order."""
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for which in random.sample((0, 1), 2):
            began = time.perf_counter()
            pair[which]()
            if turn:  # the first one compiles
                taken[which].append(1e3 * (time.perf_counter() - began))
    return taken


def _plain_kl(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    wanted, given = (one.float().log_softmax(-1) for one in (target, predicted))
    return (wanted.exp() * (wanted - given)).sum(-1)


def _plain_divergence(target: torch.Tensor, predicted: torch.Tensor, weights: torch.Tensor) -> object:
    wanted, given = (one.float().log_softmax(-1) for one in (target, predicted))
    likely = wanted.exp()
    kl = (likely * (wanted - given)).sum(-1)
    return kl, given.exp_().sub_(likely).mul_(weights[:, None]).bfloat16()


def _there_and_back(forward: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Run:
    upstream = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def _cells(taken: list[float]) -> tuple[str, str]:
    low, middle, high = np.percentile(taken, (10, 50, 90))
    return f"{middle:.1f}", f"{low:.1f} to {high:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=31, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    as_served()
    main()
