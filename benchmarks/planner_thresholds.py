"""From how many rows a persona's prefill chunk pays for its own compact pack, beside decoding on the dense one.

    python benchmarks/planner_thresholds.py --sparsity 0.25 0.5

Prints, for one layer, what `n` more rows cost on the dense pack and what they cost on a compact pack of their own. The
engine measures the first by itself when it starts, and its planner takes a pack of a share of the neurons to cost that
share of it. Weights are random, of the model's shapes, and more of them than the cache holds are used in turn.
"""

from __future__ import annotations

import argparse
import time

import torch
from machine import as_served
from torch.nn import functional as F

from masquerade_kernels.linear import pack_linear
from masquerade_kernels.packs import LayerPack


def layer(neurons: int, hidden: int, dtype: torch.dtype) -> LayerPack:
    return LayerPack(
        pack_linear(torch.randn(2 * neurons, hidden).to(dtype)), pack_linear(torch.randn(hidden, neurons).to(dtype))
    )


def run(pack: LayerPack, x: torch.Tensor) -> torch.Tensor:
    gate, up = pack.gate_up(x).chunk(2, dim=-1)
    output: torch.Tensor = pack.down(F.silu(gate).mul_(up))
    return output


def microseconds(layers: list[LayerPack], x: torch.Tensor, repeats: int) -> float:
    """The median over passes of one layer's time, in seconds of this thread and its pool."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        for pack in layers:
            run(pack, x)
        if i >= 3:
            times.append((time.perf_counter() - start) / len(layers))
    return 1e6 * sorted(times)[len(times) // 2]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--decoding", type=int, default=16, help="rows on the dense pack in any case")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = [layer(args.neurons, args.hidden, torch.bfloat16) for _ in range(args.layers)]
    alone = microseconds(dense, torch.randn(args.decoding, args.hidden).bfloat16(), args.repeats)
    print(f"bf16, {args.threads} threads, {args.decoding} decoding rows on the dense pack: {alone:.0f} us a layer")
    for sparsity in args.sparsity:
        kept = round(args.neurons * (1 - sparsity) / 32) * 32
        compact = [layer(kept, args.hidden, torch.bfloat16) for _ in range(args.layers)]
        for rows in args.rows:
            together = torch.randn(args.decoding + rows, args.hidden).bfloat16()
            riding = microseconds(dense, together, args.repeats) - alone
            own = microseconds(compact, together[:rows], args.repeats)
            print(f"sparsity {sparsity:.2f}, {rows:4} rows: riding {riding:7.0f} us, own pack {own:7.0f} us")


if __name__ == "__main__":
    as_served()
    main()
