"""Linear layers at decoding's numbers of rows: plain torch, oneDNN's layout, our compiled loops and int8, in turn.

    python benchmarks/linears.py --out benchmarks/results/linears.md

Shapes are SmolLM2-135M's, whole and at half of the FFN. Each kind has as many weights as no cache holds (80 MB), and
they are read one after another, as a step does. *Dot products* and *widened* are our loops with products of bf16 and of
float32; the engine takes what is faster on its CPU.
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
from torch import nn

from masquerade_engine.threads import available_cores
from masquerade_kernels.linear import DotLinear, Int8Linear, PackedLinear, can_dot, can_run_int8

SHAPES = {
    "gate and up": (3072, 576),
    "gate and up, half": (1536, 576),
    "down": (576, 1536),
    "down, half": (576, 768),
    "q, k and v": (960, 576),
    "o": (576, 576),
    "head": (49_152, 576),
}
ROWS = (1, 4, 16, 32, 64, 128, 256, 512)
_BYTES = 80_000_000


def main() -> None:
    """Take turns, print, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    lines = [
        "# Linear layers by number of rows",
        "",
        f"`python benchmarks/linears.py` on {machine()}, {options.threads} threads",
        "",
        "Microseconds a call, p50 over turns; weights in bf16, read from memory.",
        "",
        *header("layer", "kind", *(str(rows) for rows in ROWS)),
    ]
    for name, shape in SHAPES.items():
        for kind, figures in measured(shape, options.turns).items():
            lines.append(row(name, kind, *(f"{one:.0f}" for one in figures)))
    table = "\n".join([*lines, ""])
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


@torch.inference_mode()
def measured(shape: tuple[int, int], turns: int) -> dict[str, list[float]]:
    """Microseconds by number of rows, of every kind that runs here."""
    weights = [torch.randn(shape).bfloat16() for _ in range(max(2, _BYTES // (2 * shape[0] * shape[1])))]
    kinds: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        "torch": [_plain(weight) for weight in weights],
        "oneDNN": [PackedLinear(weight) for weight in weights],
    }
    if can_dot(weights[0]):
        kinds["dot products"] = [DotLinear(weight, products=torch.bfloat16) for weight in weights]
        kinds["widened"] = [DotLinear(weight, products=torch.float32) for weight in weights]
    if can_run_int8("cpu"):
        kinds["int8"] = [Int8Linear(weight) for weight in weights]
    figures: dict[str, list[float]] = {kind: [] for kind in kinds}
    for num_rows in ROWS:
        x = torch.randn(num_rows, shape[1]).bfloat16()
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(turns):
            for kind in random.sample(list(kinds), len(kinds)):
                began = time.perf_counter()
                for linear in kinds[kind]:
                    linear(x)
                seconds[kind].append((time.perf_counter() - began) / len(weights))
        for kind, taken in seconds.items():
            figures[kind].append(1e6 * float(np.median(taken)))
    return figures


def _plain(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: nn.functional.linear(x, weight)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    as_served()
    main()
