"""This engine beside its peers, in one session and in turn: output tokens/s, and ratios with 95 % intervals.

    python benchmarks/peers.py --out benchmarks/results/peers.md
    python benchmarks/peers.py --only ours generate --rounds 3
    python benchmarks/peers.py --quick                              # a try-out: one round, no sweep

16 streams of 16 personas, each with a persona prompt of about 170 tokens, a question of 30 and 64 tokens to write.
Peers: transformers' batched `generate`, transformers' continuous batching, PEFT's mixed-adapter batch (one LoRA of
rank 16 a persona) on `generate`, and llama.cpp through node-llama-cpp on the GGUF that the bundled model comes from.
Each runs in a process of its own with a thread for every core, loaded once and asleep while others run; its settings
are the best of a small sweep (--no-sweep: of an earlier one). Rounds go through all runs in turn, and ratios are taken
round by round.

Warmed: every persona has been spoken to before, with other questions. Cold: personas that nobody has spoken to, their
masks (adapters) being there. `generate`, and so PEFT on it, keeps nothing between calls: warm and cold are the same.

Two of the peers are optional, and the table says where one is absent:

    pip install --no-deps peft                     # it must not bring another torch
    npm install --prefix benchmarks/peers          # node-llama-cpp, with its prebuilt binaries
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from intervals import paired_ratio
from machine import machine
from planner_thresholds import layer, microseconds
from serving import CACHE_DIR
from town import PROMPT_TOKENS, QUESTION_TOKENS, Character, character, overlapping_subnetworks, prompt, union_share

from masquerade_engine import Base, load_base
from masquerade_engine.gguf_cache import bundled_gguf
from masquerade_engine.threads import available_cores, barrier_settings
from masquerade_masks import round_kept
from masquerade_pruner.bootstrap import Interval

_FOLDER = Path(__file__).resolve().parent
_SPARSITY, _UNION_SPARSITY = 0.5, 0.35
_SAMPLED = (0.8, 0.95)  # temperature, top_p
_WARM_RUNS, _WARM_TOKENS = 2, 4  # twice: a pack for personas that are active together is not wanted at first
_SWEEP_RUNS = 2

Settings = dict[str, Any]


# --- what is run


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare, and what its sweep tries."""

    name: str
    command: tuple[str, ...]
    sweep: tuple[Settings, ...]
    streams: int = 16  # that its sweep runs with


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to run an engine."""

    key: str
    peer: str
    kind: str = "dense"
    streams: int = 16
    warmed: bool = True
    sampled: bool = False

    def __str__(self) -> str:
        state = "warmed" if self.warmed else "cold"
        return f"{self.peer}, {self.kind} | {self.streams} | {state} | {'sampled' if self.sampled else 'greedy'}"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of the table: one cell over another, and what it must reach."""

    name: str
    ours: str
    theirs: str
    least: float | None = None
    of_low_end: bool = False  # whether the interval's lower end must reach it
    by_tpot: bool = False  # speed between tokens instead of tokens/s
    rows: int = 16  # decoding at once
    kept: float | None = None  # share of the FFN that is read: the gain over the base is predicted from it


def peers(formats: Sequence[str]) -> list[Peer]:
    """All of them; `ours` once for each weight format."""
    python, cores = sys.executable, available_cores()
    generate = (python, "generate.py")
    attention = ("sdpa", "eager")
    made = [Peer(_ours(one), (python, "ours.py"), ({"quantization": one},)) for one in formats]
    made.append(Peer("generate", generate, tuple({"dtype": "bfloat16", "attention": one} for one in attention)))
    adapters = (["q_proj", "v_proj"], "all-linear")
    sweep = tuple({"dtype": "bfloat16", "attention": "sdpa", "adapters": one} for one in adapters)
    made.append(Peer("PEFT", generate, sweep))
    common: Settings = {"dtype": "bfloat16", "cache_tokens": 16_384, "max_batch_tokens": 512}
    continuous = (
        common | {"attention": "sdpa", "page_size": 16, "scheduler": "fifo"},
        common | {"attention": "sdpa", "page_size": 64, "scheduler": "fifo"},
        common | {"attention": "sdpa", "page_size": 16, "scheduler": "prefill_first"},
        common | {"attention": "paged|eager", "page_size": 16, "scheduler": "fifo"},
    )
    made.append(Peer("continuous batching", (python, "continuous.py"), continuous))
    llama = tuple(
        {"threads": threads, "batch_size": size, "flash_attention": flash}
        for threads in sorted({cores, max(1, cores - 1)}, reverse=True)
        for size in (512, 2048)
        for flash in (True, False)
    )
    node = ("node", "llama_cpp.js")
    return [*made, Peer("llama.cpp", node, llama), Peer("llama.cpp, one stream", node, llama, streams=1)]


def cells(formats: Sequence[str]) -> list[Cell]:
    """Every run of a round, in turn. Cold ones come last: they push what is cached aside."""
    made = [
        Cell("distinct", "ours", "distinct"),
        Cell("base", "ours", "base"),
        Cell("one", "ours", "one"),
        Cell("cast", "ours", "overlapping"),
        Cell("generate", "generate"),
        Cell("continuous", "continuous batching"),
        Cell("peft", "PEFT"),
        Cell("llama", "llama.cpp"),
        Cell("one-1", "ours", "one", streams=1),
        Cell("base-1", "ours", "base", streams=1),
        Cell("llama-1", "llama.cpp, one stream", streams=1),
        Cell("distinct-sampled", "ours", "distinct", sampled=True),
        Cell("base-sampled", "ours", "base", sampled=True),
        Cell("generate-sampled", "generate", sampled=True),
        Cell("continuous-sampled", "continuous batching", sampled=True),
        Cell("peft-sampled", "PEFT", sampled=True),
        Cell("llama-sampled", "llama.cpp", sampled=True),
    ]
    for one in formats:
        if one != "none":
            made += [
                Cell(f"distinct-{one}", _ours(one), "distinct"),
                Cell(f"base-{one}", _ours(one), "base"),
                Cell(f"one-1-{one}", _ours(one), "one", streams=1),
            ]
    return [
        *made,
        Cell("distinct-cold", "ours", "distinct", warmed=False),
        Cell("base-cold", "ours", "base", warmed=False),
        Cell("continuous-cold", "continuous batching", warmed=False),
        Cell("llama-cold", "llama.cpp", warmed=False),
    ]


def targets(formats: Sequence[str]) -> list[Target]:
    """The figures, and what each must reach."""
    union = 1 - _UNION_SPARSITY
    made = [
        Target("16 distinct personas over `generate`, warmed", "distinct", "generate", 2.3),
        Target("the same, cold", "distinct-cold", "generate", 1.5),
        Target("the same, sampled", "distinct-sampled", "generate-sampled"),
        Target("over continuous batching, warmed", "distinct", "continuous", 5.0),
        Target("the same, cold", "distinct-cold", "continuous-cold"),
        Target("the same, sampled", "distinct-sampled", "continuous-sampled"),
        Target("over PEFT's mixed adapters", "distinct", "peft"),
        Target("the same, sampled", "distinct-sampled", "peft-sampled"),
        Target("over llama.cpp, warmed", "distinct", "llama", 2.0),
        Target("the same, cold", "distinct-cold", "llama-cold"),
        Target("the same, sampled", "distinct-sampled", "llama-sampled"),
        Target("mixing: 16 personas over the unpruned base", "distinct", "base", 0.95, of_low_end=True),
        Target("the same, cold", "distinct-cold", "base-cold"),
        Target("a cast that keeps 65 % together over the base", "cast", "base", 1.0, of_low_end=True, kept=union),
        Target("one persona, 16 streams, over the base", "one", "base", kept=1 - _SPARSITY),
        Target("one persona, 1 stream, over the base", "one-1", "base-1", rows=1, kept=1 - _SPARSITY),
        Target("one stream's speed between tokens over llama.cpp's", "one-1", "llama-1", 0.6, by_tpot=True),
    ]
    for one in formats:
        if one != "none":
            made += [
                Target(f"{one} weights: 16 distinct personas over `generate`", f"distinct-{one}", "generate", 3.0),
                Target(f"{one} weights: over llama.cpp", f"distinct-{one}", "llama", 2.0),
                Target(f"{one} weights: mixing", f"distinct-{one}", f"base-{one}", 0.95, of_low_end=True),
                Target(f"{one} weights: one stream's speed", f"one-1-{one}", "llama-1", 0.6, by_tpot=True),
            ]
    return made


def _ours(quantization: str) -> str:
    return "ours" if quantization == "none" else f"ours, {quantization}"


# --- running it


@dataclass(frozen=True, slots=True)
class Measured:
    """One run."""

    tokens_per_s: float
    ttft_s: float  # median over streams
    tpot_s: float  # mean over streams
    gap_p50_s: float  # between two tokens of one stream: a decoding step
    gap_p99_s: float
    cached_share: float  # of prompt tokens
    packs: str

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Measured:
        moments = np.array(answer["moments"])  # [streams, tokens]
        gap_p50_s, gap_p99_s = np.percentile(np.diff(moments, axis=1), (50, 99))
        return cls(
            tokens_per_s=moments.size / answer["seconds"],
            ttft_s=float(np.median(moments[:, 0])),
            tpot_s=float((moments[:, -1] - moments[:, 0]).mean() / max(1, moments.shape[1] - 1)),
            gap_p50_s=float(gap_p50_s),
            gap_p99_s=float(gap_p99_s),
            cached_share=answer["num_cached_tokens"] / answer["num_prompt_tokens"],
            packs=answer.get("packs", ""),
        )


class Absent(Exception):
    """A peer that is not installed, or does not run here."""


@dataclass(slots=True)
class Worker:
    """A peer's process; see peers/worker.py for what is said."""

    process: subprocess.Popen[str]
    log: Path
    warm: set[tuple[str, bool]] = field(default_factory=set)  # kind and sampled of what has met the personas

    def ask(self, message: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a run, or nothing, and wait for the next answer. Raises `Absent`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if message is not None:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Absent(f"it ended: {_last_line(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise Absent(str(answer["absent"]))
        return answer


@dataclass(frozen=True, slots=True)
class Session:
    """What all runs share."""

    base: Base
    options: argparse.Namespace
    cast: list[Character]
    folder: Path  # of logs

    @contextmanager
    def worker(self, peer: Peer, setting: Settings) -> Iterator[Worker]:
        """A peer's process with one setting, ready. Raises `Absent`."""
        options = self.options
        settings = {
            "engine": setting,
            "model": options.model,
            "path": str(self.base.path),
            "gguf": str(self.base.source),
            "cache_dir": str(options.cache_dir),
            "personas": len(self.cast),
            "streams": peer.streams,
            "sparsity": _SPARSITY,
            "union_sparsity": _UNION_SPARSITY,
            "context_size": 512,
        }
        log = self.folder / f"{peer.name.replace(' ', '-')}.log"
        executable, script = peer.command
        with log.open("a") as errors, _process([executable, script, json.dumps(settings)], errors) as process:
            worker = Worker(process, log)
            worker.ask()
            yield worker

    def run(self, worker: Worker, cell: Cell, seed: str) -> Measured:
        """One run of a cell; where it is to be warmed and something cold came between, warm it first."""
        cast = self.cast
        if not cell.warmed:
            cast = [character(self.base, f"{seed}/{cell.key}/{one}") for one in range(len(cast))]
            worker.warm.clear()
        elif (cell.kind, cell.sampled) not in worker.warm:
            for number in range(_WARM_RUNS):
                worker.ask(self._message(cell, cast, f"warm {number}/{seed}", _WARM_TOKENS))
            worker.warm.add((cell.kind, cell.sampled))
        return Measured.of(worker.ask(self._message(cell, cast, f"{seed}/{cell.key}", self.options.tokens)))

    def _message(self, cell: Cell, cast: Sequence[Character], seed: str, num_tokens: int) -> dict[str, Any]:
        temperature, top_p = _SAMPLED if cell.sampled else (0.0, 1.0)
        return {
            "kind": cell.kind,
            "prompts": [prompt(self.base, one, f"{seed}/{one.name}") for one in cast[: cell.streams]],
            "personas": list(range(cell.streams)),
            "num_tokens": num_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": zlib.crc32(seed.encode()) % 2**31,
            "warmed": cell.warmed,
        }


@contextmanager
def _process(command: list[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    cores = str(available_cores())
    paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"OMP_NUM_THREADS": cores, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}
    if command[1] == "ours.py":
        environ |= barrier_settings(environ)  # as `masquerade serve` has it
    try:
        process = subprocess.Popen(
            command,
            cwd=_FOLDER / "peers",
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    except FileNotFoundError as missing:
        raise Absent(f"{command[0]} is not installed") from missing
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def best_worker(
    session: Session, peer: Peer, first: Cell, stack: ExitStack
) -> tuple[Worker, Settings, list[tuple[Settings, float]]]:
    """The peer at the best of its sweep, running, with tokens/s of every setting. Raises `Absent` if none runs."""
    found: list[tuple[Settings, float]] = []
    best: tuple[float, ExitStack, Worker, Settings] | None = None
    why = "no setting runs"
    for setting in peer.sweep[:1] if session.options.no_sweep else peer.sweep:
        own = ExitStack()
        try:
            worker = own.enter_context(session.worker(peer, setting))
            speed = max(session.run(worker, first, f"sweep/{n}").tokens_per_s for n in range(_SWEEP_RUNS))
        except Absent as absent:
            own.close()
            why = str(absent)
            _say(f"{peer.name} {_words(setting)}: {why}")
            continue
        _say(f"{peer.name} {_words(setting)}: {speed:.1f} tokens/s")
        found.append((setting, speed))
        if best is None or speed > best[0]:
            if best is not None:
                best[1].close()
            best = speed, own, worker, setting
        else:
            own.close()
    if best is None:
        raise Absent(why)
    stack.enter_context(best[1])
    return best[2], best[3], found


def ffn_share(base: Base, rows: int, step_s: float, repeats: int) -> float:
    """The share of a decoding step of the base that its FFN takes, timed alone on random weights of its shapes."""
    shape = base.shape
    layers = [layer(shape.intermediate_size, shape.hidden_size, base.dtype) for _ in range(shape.num_layers)]
    each_us = microseconds(layers, torch.randn(rows, shape.hidden_size).to(base.dtype), repeats)
    return min(1.0, shape.num_layers * each_us * 1e-6 / step_s)


def main() -> None:
    """Sweep, run in turn, print, write."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no orphans under `timeout`
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.cache_dir)
    wanted = [peer for peer in peers(options.formats) if not options.only or _matches(peer.name, options.only)]
    chosen: dict[str, str] = {}
    series: dict[str, list[Measured]] = defaultdict(list)
    ran: list[Cell] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="masquerade-peers-")))
        session = Session(base, options, [character(base, number) for number in range(16)], folder)
        workers: dict[str, Worker] = {}
        for peer in wanted:
            own = [cell for cell in cells(options.formats) if cell.peer == peer.name]
            try:
                workers[peer.name], setting, found = best_worker(session, peer, own[0], stack)
            except Absent as absent:
                chosen[peer.name] = f"absent: {absent}"
                continue
            others = "; ".join(f"{_words(one)}: {speed:.0f}" for one, speed in found if one != setting)
            chosen[peer.name] = _words(setting) + (f" (tried, tokens/s: {others})" if others else "")
            ran += own
        ran.sort(key=lambda cell: [one.key for one in cells(options.formats)].index(cell.key))
        for number in range(options.rounds):
            for cell in ran:
                if cell.peer not in workers:
                    continue
                try:
                    measured = session.run(workers[cell.peer], cell, f"round {number}")
                except Absent as absent:
                    chosen[cell.peer] += f"; in round {number + 1} {absent}"
                    del workers[cell.peer]
                    continue
                series[cell.key].append(measured)
                _say(f"round {number + 1}/{options.rounds} {cell.key}: {measured.tokens_per_s:.1f} tokens/s")
    table = _table(base, options, chosen, ran, series)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PEER", help="beginnings of names: ours generate PEFT llama ...")
    parser.add_argument("--rounds", type=int, default=7, help="through all runs in turn (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="to write in each stream (%(default)s)")
    parser.add_argument("--no-sweep", action="store_true", help="the first setting of each: the best found so far")
    parser.add_argument("--quick", action="store_true", help="one round, the first setting of each sweep")
    parser.add_argument(
        "--formats", nargs="+", default=["none", "int8"], help="of this engine's weights; none is the bf16 of the peers"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="llama.cpp needs a GGUF (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.no_sweep = 1, True
    return options


# --- the table


def _table(
    base: Base,
    options: argparse.Namespace,
    chosen: dict[str, str],
    ran: Sequence[Cell],
    series: dict[str, list[Measured]],
) -> str:
    union = union_share(overlapping_subnetworks(base, _SPARSITY, _UNION_SPARSITY, 16, seed=0))
    kept = round_kept(base.shape.intermediate_size, _SPARSITY) / base.shape.intermediate_size
    temperature, top_p = _SAMPLED
    lines = [
        "# This engine and its peers",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"{base.name}; prompts of about {PROMPT_TOKENS} tokens of persona and {QUESTION_TOKENS} of question, with the "
        f"template's own; {options.tokens} tokens written in each stream; {options.rounds} rounds in turn. Sampled: "
        f"temperature {temperature:g}, top_p {top_p:g}. Masks keep {kept:.0%} each; the overlapping ones {union:.0%} "
        f"together. llama.cpp reads {_gguf_name(base)}.",
        "",
        "| engine | settings |",
        "| --- | --- |",
        *(f"| {name} | {setting} |" for name, setting in chosen.items()),
        "",
        "Medians over rounds. TTFT: the median stream's; TPOT: mean time between its tokens; hits: prompt tokens that",
        "came from the engine's prefix cache; packs: what the personas of the last round ran on.",
        "",
        "| engine | streams | state | picked | tokens/s | least to most | TTFT ms | TPOT ms | gap p99 ms | hits "
        "| packs |",
        "|" + " --- |" * 11,
        *(_cell_row(cell, series[cell.key]) for cell in ran),
        "",
        "Ratios are of the same round, their mean with its 95 % bootstrap interval over rounds.",
        "",
        "| figure | ratio | 95 % interval | must reach | |",
        "|" + " --- |" * 5,
        *(_target_row(target, series) for target in targets(options.formats)),
        "",
        *_predictions(base, options, series),
    ]
    return "\n".join([*lines, ""])


def _gguf_name(base: Base) -> str:
    if base.source.suffix != ".gguf":
        return "nothing: the model is no GGUF"
    bundled = " (Q4_1; the others read it dequantised to bf16)" if base.source == bundled_gguf() else ""
    return f"{base.source.name}{bundled}"


def _cell_row(cell: Cell, runs: Sequence[Measured]) -> str:
    speeds = [one.tokens_per_s for one in runs]
    times = " | ".join(
        f"{1000 * float(np.median(values)):.1f}"
        for values in zip(*((one.ttft_s, one.tpot_s, one.gap_p99_s) for one in runs), strict=True)
    )
    hits = float(np.mean([one.cached_share for one in runs]))
    speed = f"{np.median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f}"
    return f"| {cell} | {speed} | {times} | {hits:.0%} | {runs[-1].packs} |"


def _ratio(target: Target, series: dict[str, list[Measured]]) -> Interval | None:
    rounds = list(zip(series.get(target.ours, ()), series.get(target.theirs, ()), strict=False))  # one may have died
    if not rounds:
        return None
    if target.by_tpot:
        return paired_ratio([1 / ours.tpot_s for ours, _ in rounds], [1 / theirs.tpot_s for _, theirs in rounds])
    return paired_ratio([ours.tokens_per_s for ours, _ in rounds], [theirs.tokens_per_s for _, theirs in rounds])


def _target_row(target: Target, series: dict[str, list[Measured]]) -> str:
    ratio = _ratio(target, series)
    wanted = "" if target.least is None else f"{'lower end ' if target.of_low_end else ''}{target.least:g}"
    if ratio is None:
        return f"| {target.name} | not run | | {wanted} | |"
    verdict = ""
    if target.least is not None:
        verdict = "reached" if (ratio.low if target.of_low_end else ratio.mean) >= target.least else "**missed**"
    return f"| {target.name} | {ratio.mean:.2f} | {ratio.low:.2f} to {ratio.high:.2f} | {wanted} | {verdict} |"


def _predictions(base: Base, options: argparse.Namespace, series: dict[str, list[Measured]]) -> Iterator[str]:
    """What a pack should gain: the FFN's share of the base's step, less what the pack does not read."""
    wanted = [one for one in targets(options.formats) if one.kept is not None]
    ready = [(one, ratio) for one in wanted if (ratio := _ratio(one, series)) is not None]
    if not ready:
        return
    yield "Gains over the base, predicted as 1 / (1 - share x (1 - kept)) from the FFN's share of its decoding step,"
    yield "timed alone; at least 70 % of the predicted gain must be there."
    yield ""
    yield "| figure | FFN share | kept | predicted | measured | of the gain | |"
    yield "|" + " --- |" * 7
    for target, ratio in ready:
        assert target.kept is not None
        step_s = float(np.median([one.gap_p50_s for one in series[target.theirs]]))
        share = ffn_share(base, target.rows, step_s, repeats=5 if options.quick else 25)
        predicted = 1 / (1 - share * (1 - target.kept))
        gained = (ratio.mean - 1) / (predicted - 1)
        verdict = "reached" if gained >= 0.7 else "**missed**"
        yield (
            f"| {target.name} | {share:.0%} | {target.kept:.0%} | {predicted:.2f} | {ratio.mean:.2f} "
            f"| {gained:.0%} | {verdict} |"
        )


def _words(setting: Settings) -> str:
    shown = ", ".join(f"{name} {'+'.join(one) if isinstance(one, list) else one}" for name, one in setting.items())
    return shown or "defaults"


def _matches(name: str, beginnings: Sequence[str]) -> bool:
    return any(name.startswith(one) for one in beginnings)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
