"""The gathered FFN's kernels on a GPU: bytes a second against a copy, and time against cuBLAS on the dense weights.

    python benchmarks/gathered_ffn.py --out benchmarks/results/gathered_ffn.md
    python benchmarks/gathered_ffn.py --sweep --shapes 3b --tokens 1 16

Weights are random, of the models' FFN shapes. A measurement is one CUDA graph of several layers in turn, after the L2
cache was overwritten, timed by CUDA events and divided by the layers; what is compared is measured in turn, round after
round. *dense* is three `F.linear` and SiLU, with no masks at all; *dense pack* is what serves a mix of personas without
gathering: gate and up in one product, each token's coefficients, then down. Without a GPU it exits with code 2;
`--interpret` runs one tiny shape through triton's interpreter, for its correctness only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from masquerade_kernels import persona_ffn_reference
from masquerade_kernels.gathered import (
    GatheredLayer,
    GatheredLayerPack,
    gathered_ffn,
    gathered_layer_pack,
    num_multiprocessors,
)
from masquerade_kernels.gathered_blocks import FFNBlocks, choose_blocks

SHAPES = {"3b": ("Llama-3.2-3B", 3072, 8192), "8b": ("Llama-3.1-8B", 4096, 14336)}  # hidden, intermediate
POOL = 0.3  # high overlap: masks are drawn from their size and this share of the rest; at 50 %, 65 % together
COPY_BYTES = 2**29  # read, and as many written
WARM_UPS = 3
COPY_GOAL = 0.85  # of the copy's bandwidth, one persona, up to 16 tokens
MIXED_GOAL = 1.05  # times dense
NO_GPU = "gathered_ffn.py measures a CUDA GPU, and torch finds none here; --interpret checks one tiny shape without."
COLUMNS = (
    *("model", "sparsity", "masks", "personas", "tokens", "union", "gathered", "TB/s", "of copy"),
    *("dense", "dense pack", "gathered / dense", "would choose", "chosen / dense"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured together."""

    shape: str
    sparsity: float
    overlap: str  # "chance" or "high"; of one persona "one"
    personas: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a layer over the rounds."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, microseconds: Iterable[float]) -> Timing:
        return cls(*(float(value) for value in np.percentile(list(microseconds), [10, 50, 90])))

    def __str__(self) -> str:
        return f"{self.p50:.1f} ({self.p10:.1f} to {self.p90:.1f})"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table; rates in bytes a second."""

    case: Case
    union: float  # share of the neurons that the kernels read, mean over layers
    gathered: Timing
    dense: Timing
    dense_pack: Timing
    weight_rate: float  # weights of the union over the gathered median
    copy_rate: float  # bytes read and written

    @property
    def chosen(self) -> str:
        return "gathered" if self.gathered.p50 <= self.dense_pack.p50 else "dense pack"

    @property
    def chosen_over_dense(self) -> float:
        return min(self.gathered.p50, self.dense_pack.p50) / self.dense.p50


def main() -> int:
    args = arguments()
    if args.interpret:
        return check_in_interpreter()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if args.sweep:
        for shape, tokens in itertools.product(args.shapes, args.tokens):
            sweep(Case(shape, 0.5, "one", 1, tokens), args)
        return 0
    results = []
    for case in cases(args):
        results.append(measure(case, args))
        print(row(results[-1]), flush=True)
    report = "\n".join(lines_of_report(results, args))
    print(report)
    if args.out is not None:
        args.out.write_text(report + "\n")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--personas", type=int, nargs="+", default=[1, 4, 16, 64], help="at most one a token")
    parser.add_argument("--overlap", nargs="+", choices=["chance", "high"], default=["chance", "high"])
    parser.add_argument("--layers", type=int, default=6, help="different weights that are read in turn")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--sweep", action="store_true", help="try other block sizes, for one persona at 50 %%")
    parser.add_argument("--interpret", action="store_true", help="no GPU: one tiny shape, correctness only")
    parser.add_argument("--out", type=Path, help="write the report there as Markdown")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for shape, sparsity, personas, tokens in itertools.product(args.shapes, args.sparsity, args.personas, args.tokens):
        if personas <= tokens:
            for overlap in args.overlap if personas > 1 else ["one"]:
                yield Case(shape, sparsity, overlap, personas, tokens)


# Inputs.


def masks(case: Case, intermediate: int, rng: np.random.Generator) -> np.ndarray:
    """Bool `[personas, intermediate]`, each with the same number kept."""
    kept = round(intermediate * (1 - case.sparsity) / 32) * 32
    pool_size = kept + round(POOL * (intermediate - kept)) if case.overlap == "high" else intermediate
    pool = rng.permutation(intermediate)[:pool_size]
    dense = np.zeros((case.personas, intermediate), dtype=np.bool_)
    for mask in dense:
        mask[rng.permutation(pool)[:kept]] = True
    return dense


def layer_pack(dense: np.ndarray, weights: GatheredLayer) -> tuple[GatheredLayerPack, torch.Tensor]:
    """The union of masks `[personas, intermediate]`, and their coefficients `[personas + 1, intermediate]`."""
    coefficients = np.concatenate([np.ones((1, dense.shape[1])), dense]).astype(np.float32)
    neurons = np.flatnonzero(dense.any(axis=0)).astype(np.int32)
    rows = np.ascontiguousarray(coefficients[:, neurons])
    table = torch.from_numpy(coefficients).to(weights.down_t.device)
    return gathered_layer_pack(weights, neurons, rows), table


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights in every form that is compared."""

    down: torch.Tensor  # [hidden, intermediate]
    gathered: GatheredLayer

    @classmethod
    def random(cls, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> Layer:
        stacked = torch.randn(2 * intermediate, hidden, dtype=dtype, device=device) / hidden**0.5
        down = torch.randn(hidden, intermediate, dtype=dtype, device=device) / intermediate**0.5
        return cls(down, GatheredLayer(stacked, down.T.contiguous()))


@dataclass(frozen=True, slots=True)
class Inputs:
    """All tensors of one case."""

    x: torch.Tensor  # [tokens, hidden]
    persona_of_token: torch.Tensor  # int32 [tokens]
    layers: list[Layer]
    packs: list[GatheredLayerPack]
    coefficients: list[torch.Tensor]  # float32 [personas + 1, intermediate] a layer

    @property
    def union(self) -> float:
        kept = sum(len(pack.neurons) for pack in self.packs)
        return kept / (len(self.packs) * len(self.layers[0].gathered.down_t))


def make_inputs(
    case: Case, hidden: int, intermediate: int, num_layers: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    layers = [Layer.random(hidden, intermediate, dtype, device) for _ in range(num_layers)]
    built = [layer_pack(masks(case, intermediate, rng), layer.gathered) for layer in layers]
    # Row 0 is the base; neighbours are of different personas, as in a mixed decode.
    of_token = torch.arange(case.tokens, dtype=torch.int32, device=device) % case.personas + 1
    x = torch.randn(case.tokens, hidden, dtype=dtype, device=device)
    return Inputs(x, of_token, layers, [pack for pack, _ in built], [table for _, table in built])


# What is compared.


def run_gathered(inputs: Inputs, blocks: FFNBlocks | None = None) -> torch.Tensor:
    for layer, pack in zip(inputs.layers, inputs.packs, strict=True):
        output = gathered_ffn(
            inputs.x, layer.gathered, pack.neurons, pack.coefficients, inputs.persona_of_token, blocks=blocks
        )
    return output


def run_dense(inputs: Inputs) -> torch.Tensor:
    for layer in inputs.layers:
        gate, up = F.linear(inputs.x, layer.gathered.gate), F.linear(inputs.x, layer.gathered.up)
        output = F.linear(F.silu(gate) * up, layer.down)
    return output


def run_dense_pack(inputs: Inputs) -> torch.Tensor:
    for layer, coefficients in zip(inputs.layers, inputs.coefficients, strict=True):
        gate, up = F.linear(inputs.x, layer.gathered.gate_up).chunk(2, dim=-1)
        h = F.silu(gate).mul_(up).mul_(coefficients.index_select(0, inputs.persona_of_token))
        output = h @ layer.gathered.down_t  # the transposed copy serves both, so one copy is enough
    return output


def relative_error(inputs: Inputs) -> float:
    """Of the last layer's first tokens, against float64."""
    found = run_gathered(inputs)[:4].double()
    layer = inputs.layers[-1].gathered
    coefficients = inputs.coefficients[-1][inputs.persona_of_token[:4].long()]
    exact = persona_ffn_reference(inputs.x[:4], layer.gate, layer.up, layer.down_t.T, coefficients)
    return float((found - exact).norm() / exact.norm())


# Measuring.


def measure(case: Case, args: argparse.Namespace) -> Result:
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    _, hidden, intermediate = SHAPES[case.shape]
    inputs = make_inputs(case, hidden, intermediate, args.layers, dtype, device)
    error = relative_error(inputs)
    if not error < 0.01:  # bf16 is about 0.003; NaN is refused too
        raise SystemExit(f"the kernels are wrong for {case}: relative error {error:.2g}")
    source = torch.randn(COPY_BYTES // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    timed = in_turn(
        {
            "gathered": lambda: run_gathered(inputs),
            "dense": lambda: run_dense(inputs),
            "dense pack": lambda: run_dense_pack(inputs),
            "copy": lambda: target.copy_(source),
        },
        args.rounds,
    )
    gathered, dense, dense_pack = (
        Timing.of(time / args.layers for time in timed[name]) for name in ("gathered", "dense", "dense pack")
    )
    weight_bytes = 3 * inputs.union * intermediate * hidden * dtype.itemsize
    return Result(
        case,
        inputs.union,
        gathered,
        dense,
        dense_pack,
        weight_rate=weight_bytes / gathered.p50 * 1e6,
        copy_rate=2 * COPY_BYTES / Timing.of(timed["copy"]).p50 * 1e6,
    )


def in_turn(runs: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each run in each round, as CUDA graphs, from an L2 cache full of something else."""
    graphs = {name: captured(run) for name, run in runs.items()}
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    other = torch.empty(4 * l2_bytes, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for index, (name, graph) in itertools.product(range(WARM_UPS + rounds), graphs.items()):
        other.zero_()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        if index >= WARM_UPS:
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1000 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def captured(run: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets cuBLAS allocate, before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


# Block sizes other than the table's.


def sweep(case: Case, args: argparse.Namespace) -> None:
    """Print the fastest blocks of either kernel, the other's left as the table has them."""
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    name, hidden, intermediate = SHAPES[case.shape]
    inputs = make_inputs(case, hidden, intermediate, args.layers, dtype, device)
    kept = len(inputs.packs[0].neurons)
    table = choose_blocks(case.tokens, kept, hidden, itemsize=dtype.itemsize, num_sms=num_multiprocessors(device))
    print(f"\n{name}, {case.tokens} tokens, {kept} neurons; the table has {table}")
    for kernel, choices in (("gate_up", gate_up_choices(table)), ("down", down_choices(table))):
        timed = [(blocks_timing(inputs, blocks, args), getattr(blocks, kernel)) for blocks in (table, *choices)]
        print(f"{kernel}: the table's {timed[0][0]} us a layer; fastest:")
        for timing, blocks in sorted(((t, b) for t, b in timed if t is not None), key=lambda pair: pair[0].p50)[:5]:
            print(f"  {timing} us  {blocks}")


def gate_up_choices(table: FFNBlocks) -> Iterator[FFNBlocks]:
    for neurons, columns, warps, stages in itertools.product([16, 32, 64, 128], [64, 128, 256], [4, 8], [3, 4, 5]):
        blocks = replace(table.gate_up, neurons=neurons, hidden=columns, num_warps=warps, num_stages=stages)
        yield replace(table, gate_up=blocks)


def down_choices(table: FFNBlocks) -> Iterator[FFNBlocks]:
    tiles = itertools.product([32, 64, 128], [32, 64, 128, 256])
    for (neurons, columns), stages, splits in itertools.product(tiles, [3, 4, 5], [1, 2, 4, 8, 16]):
        blocks = replace(table.down, neurons=neurons, hidden=columns, num_stages=stages, num_splits=splits)
        yield replace(table, down=blocks)


def blocks_timing(inputs: Inputs, blocks: FFNBlocks, args: argparse.Namespace) -> Timing | None:
    """None where the blocks ask for more shared memory or registers than there are."""
    try:
        timed = in_turn({"blocks": lambda: run_gathered(inputs, blocks)}, args.rounds)
    except Exception as error:
        if type(error).__name__ in ("OutOfResources", "PTXASError", "CompilationError"):
            return None
        raise
    return Timing.of(time / args.layers for time in timed["blocks"])


# The report.


def lines_of_report(results: list[Result], args: argparse.Namespace) -> Iterator[str]:
    yield "# Gathered FFN kernels\n"
    yield f"`python benchmarks/gathered_ffn.py` on {device_line()}\n"
    copy_rate = float(np.median([result.copy_rate for result in results]))
    yield (
        f"{args.dtype}, {args.layers} layers and {args.rounds} rounds in turn; medians (10th to 90th percentile) in "
        f"microseconds a layer. *of copy* is the rate at which the union's weights are read over a copy's rate in the "
        f"same rounds ({copy_rate / 1e12:.2f} TB/s in the median case).\n"
    )
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + " --- |" * len(COLUMNS)
    for result in results:
        yield row(result)
    yield "\n## Goals\n"
    yield from goals(results)
    yield "\n## Where gathering stops to pay\n"
    yield from thresholds(results)


def row(result: Result) -> str:
    case = result.case
    cells = [
        SHAPES[case.shape][0],
        f"{case.sparsity:.0%}",
        case.overlap,
        str(case.personas),
        str(case.tokens),
        f"{result.union:.0%}",
        str(result.gathered),
        f"{result.weight_rate / 1e12:.2f}",
        f"{result.weight_rate / result.copy_rate:.0%}",
        str(result.dense),
        str(result.dense_pack),
        f"{result.gathered.p50 / result.dense.p50:.2f}",
        result.chosen,
        f"{result.chosen_over_dense:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def goals(results: list[Result]) -> Iterator[str]:
    alone = [result for result in results if result.case.personas == 1 and result.case.tokens <= 16]
    solo = [result.weight_rate / result.copy_rate for result in alone]
    mixed = [result.chosen_over_dense for result in results if result.case.personas > 1]
    if solo:
        yield f"- one persona, up to 16 tokens: {min(solo):.0%} of the copy's bandwidth at least (goal {COPY_GOAL:.0%})"
    if mixed:
        yield f"- mixed batches: {max(mixed):.2f} times dense at most (goal {MIXED_GOAL})"


def thresholds(results: list[Result]) -> Iterator[str]:
    """For each model and number of tokens, the unions up to which the gathered pack is the faster one."""
    for shape, tokens in sorted({(result.case.shape, result.case.tokens) for result in results}):
        here = [result for result in results if (result.case.shape, result.case.tokens) == (shape, tokens)]
        slower = min((result.union for result in here if result.chosen != "gathered"), default=2.0)
        faster = max((result.union for result in here if result.union < slower), default=None)
        up_to = "at no union measured" if faster is None else f"up to a union of {faster:.0%}"
        beyond = "" if slower > 1 else f"; the dense pack from {slower:.0%}"
        yield f"- {SHAPES[shape][0]}, {tokens} tokens: gathered {up_to}{beyond}"


def device_line() -> str:
    import triton  # noqa: PLC0415 - the script must start where there is none

    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    )


def check_in_interpreter() -> int:
    """The script's own path at one tiny shape, without a GPU and without times."""
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules, "triton was imported before it was told to interpret"
    for case in (Case("tiny", 0.5, "one", 1, 2), Case("tiny", 0.5, "high", 4, 18)):
        inputs = make_inputs(case, 64, 160, 2, torch.float32, torch.device("cpu"))
        error = relative_error(inputs)
        agree = torch.allclose(run_gathered(inputs), run_dense_pack(inputs), rtol=1e-4, atol=1e-4)
        print(f"{case.personas} personas, {case.tokens} tokens, union {inputs.union:.0%}: relative error {error:.1e}")
        if not (error < 1e-5 and agree):
            print("the kernels are wrong", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
