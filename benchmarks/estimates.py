"""Peak memory of sculpts: the estimate beside what real runs took, and what larger bases would take.

    python benchmarks/estimates.py                         # all three tables, about six minutes on two cores
    python benchmarks/estimates.py --tables shapes         # arithmetic alone
    python benchmarks/estimates.py --tables bundled --device cuda:0

A run is a whole sculpt of the smoke preset in a process of its own. On the CPU its peak is the process's largest
resident memory (VmHWM), reset at the beginning of each stage, so that a stage's own peak is seen; on a GPU it is what
torch's allocator reserved, and the context beside it is in neither figure. The ratio is estimate over truth: below 1 a
job may be let in that does not fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from serving import CACHE_DIR
from transformers import AutoConfig, AutoModelForCausalLM

from masquerade_engine.base import Base, load_base
from masquerade_engine.device_memory import DeviceMemory
from masquerade_engine.threads import available_cores
from masquerade_masks import InsufficientMemory
from masquerade_pruner import PRESETS, Execution, Progress, SculptSpec, estimate, sculpt
from masquerade_pruner.instructions import load_instructions, spread
from masquerade_pruner.memory import Shape, Workload
from masquerade_pruner.plan import Job, make_plan

GB = 1000**3
TEXT = "You are a tester of bridges who speaks in short, heavy sentences and distrusts rope."

# config.json of the Llama 3 models, as numbers.
LLAMAS = {
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, True),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, True),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, False),
}
# A default sculpt of a persona of about 1,000 characters.
WORK = Workload(
    prompt=300,
    question=30,
    answer=PRESETS["default"].answer_tokens,
    context_share=PRESETS["default"].context_share,
    branches_per_step=PRESETS["default"].branches_per_step,
    num_questions=839,
    num_answers=998,
    num_held_out=230,
)
# Random models with the bundled tokenizer: family, layers, hidden, intermediate, query and key heads, sliding window.
RANDOM_MODELS = (
    ("llama", 12, 512, 1536, 8, 2, None),
    ("llama", 6, 1024, 4096, 16, 4, None),
    ("mistral", 8, 768, 2304, 12, 4, 64),
    ("qwen2", 8, 768, 2304, 12, 4, None),
    ("qwen3", 8, 768, 2304, 12, 4, None),
)


def main() -> None:
    """Measure; print, write."""
    options = _options()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    sections = []
    if "shapes" in options.tables:
        sections.append(_shapes_section())
    if "bundled" in options.tables:
        bundled = {"base": None, "device": options.device}
        runs = [_run(bundled, way) for way in (Execution(), Execution("on"), Execution("on", 2))]
        runs += [_run(bundled | {"recovery": kind}, Execution()) for kind in ("lora", "full")]
        sections.append(_runs_section("The bundled model", runs))
    if "random" in options.tables:
        with tempfile.TemporaryDirectory(prefix="masquerade-estimates-") as folder:
            runs = [
                _run({"base": str(directory), "device": options.device, "answer_tokens": 64}, way)
                for directory in _random_bases(Path(folder), options.device)
                for way in (Execution(), Execution("on", 4))
            ]
        sections.append(_runs_section("Random models of every family", runs))
    head = f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}"
    table = "\n\n".join(["# Memory of sculpts, estimated and measured", head, *sections]) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("shapes", "bundled", "random")
    parser.add_argument("--tables", nargs="+", choices=names, default=list(names))
    parser.add_argument("--device", default="auto", help="of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- arithmetic


def _shapes_section() -> str:
    lines = [
        "## What larger bases would take",
        "",
        "A default sculpt (16 branches a step of 64 answer tokens, a prompt of 300) in bf16 at 25 %, on GPUs of 80, 24",
        "and 16 GB of which 1.5 GB are taken; GB by stage. Nothing here was run.",
        "",
        "| base | weights GB | GPU GB | plan | select | answer | learn | evaluate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, numbers in LLAMAS.items():
        shape = Shape.of(llama_config(*numbers), 2, cuda=True)
        job = Job(shape, WORK, kept=shape.intermediate * 3 // 4)
        for gpu in (80, 24, 16):
            free = int((gpu - 1.5) * GB)
            try:
                plan = make_plan(
                    job, Execution(), DeviceMemory(free, gpu * GB), None, device=f"{gpu} GB", dtype="bfloat16"
                )
            except InsufficientMemory as refused:
                how = f"refused: needs {refused.needed_bytes / GB:.1f} GB"
                cells = ["", "", "", ""]
            else:
                how = f"{plan.micro_batch} branches a pass{', checkpointing' if plan.checkpointing else ''}"
                how += f", {plan.streams} answers at once{'' if plan.keeps_learner else ', one copy of the weights'}"
                cells = [f"{plan.stage_bytes[stage] / GB:.1f}" for stage in ("select", "answer", "learn", "evaluate")]
            lines.append(f"| {name} | {shape.weights / GB:.1f} | {gpu} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def llama_config(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, tied: bool) -> Any:
    """A Llama 3 config."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
    )


# --- runs


def _run(asked: dict[str, Any], execution: Execution) -> dict[str, Any]:
    wish = {"checkpointing": execution.checkpointing, "micro_batch": execution.micro_batch}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asked | wish)], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['base']}: {found['estimate']} estimated, {found['peaks']} measured", file=sys.stderr, flush=True)
    return found


def measure(
    base: str | None,
    device: str,
    checkpointing: str,
    micro_batch: int | None,
    answer_tokens: int | None = None,
    recovery: str = "none",
) -> dict[str, Any]:
    """In a process of its own: sculpt, and note the peak of each stage."""
    torch.set_num_threads(available_cores())
    if answer_tokens is not None:
        PRESETS["smoke"] = replace(PRESETS["smoke"], answer_tokens=answer_tokens)
    loaded = load_base(base or "smollm2-135m-instruct", cache_dir=CACHE_DIR, device=device)
    watch = PeakWatch(loaded)
    with tempfile.TemporaryDirectory(prefix="masquerade-estimates-") as folder:
        questions = None if base is None else _few_questions(Path(folder))
        spec = SculptSpec("tester", "Tester", TEXT, preset="smoke", recovery=recovery, instructions=questions)  # type: ignore[arg-type]
        execution = Execution(checkpointing, micro_batch)  # type: ignore[arg-type]
        expected = estimate(spec, loaded, execution)
        cache = CACHE_DIR if base is None else Path(folder) / "cache"
        sculpt(spec, loaded, Path(folder) / "work", cache_dir=cache, execution=execution, progress=watch.progress)
    return {
        "base": loaded.name,
        "plan": expected["plan"]["summary"].split(";")[0] + ("" if recovery == "none" else f", recovery {recovery}"),
        "estimate": expected["plan"]["stage_bytes"],
        "peaks": watch.ended(),
    }


class PeakWatch:
    """The peak of each stage, from its progress."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._stage = ""
        self._peaks: dict[str, int] = {}

    def progress(self, news: Progress) -> None:
        """The sculptor's callback."""
        if news.stage != self._stage:
            self.ended()
            self._stage = news.stage

    def ended(self) -> dict[str, int]:
        """Peaks by stage, the present one's included."""
        if self._stage:
            self._peaks[self._stage] = self._peak()
            print(f"{self._stage}: {self._peaks[self._stage] / GB:.2f} GB", file=sys.stderr, flush=True)
        return self._peaks

    def _peak(self) -> int:
        """Bytes since the last call."""
        if self._base.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self._base.device)
            torch.cuda.reset_peak_memory_stats(self._base.device)
            return peak
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        return int(status["VmHWM"].split()[0]) * 1024


def _random_bases(folder: Path, device: str) -> Iterator[Path]:
    bundled = load_base(cache_dir=CACHE_DIR, device=device)
    for family, layers, hidden, intermediate, heads, kv_heads, window in RANDOM_MODELS:
        config = AutoConfig.for_model(
            family,
            vocab_size=len(bundled.tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=64,
            tie_word_embeddings=True,
            eos_token_id=bundled.tokenizer.eos_token_id,
            **({} if window is None else {"sliding_window": window}),
        )
        directory = folder / f"{family}-{layers}x{hidden}x{intermediate}"
        model = AutoModelForCausalLM.from_config(config, dtype=bundled.dtype)
        model.save_pretrained(directory)
        bundled.tokenizer.save_pretrained(directory)
        yield directory


def _few_questions(folder: Path) -> Path:
    """Some of the built-in questions as 24 topics: the reference personas are run over them all."""
    built_in = load_instructions()
    few = spread([*built_in.train, *built_in.validation, *built_in.test], 72)
    rows = [
        {"instruction": one.text, "output": one.output, "topic": f"topic{index % 24}"} for index, one in enumerate(few)
    ]
    file = folder / "questions.json"
    file.write_text(json.dumps(rows))
    return file


def _runs_section(title: str, runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"## {title}",
        "",
        "| base | way | stage | estimated GB | measured GB | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        for stage, peak in run["peaks"].items():
            lines.append(_line(run, stage, run["estimate"][stage], peak))
        lines.append(_line(run, "**whole**", max(run["estimate"].values()), max(run["peaks"].values())))
    return "\n".join(lines)


def _line(run: dict[str, Any], stage: str, estimated: int, measured: int) -> str:
    ratio = estimated / measured
    return f"| {run['base']} | {run['plan']} | {stage} | {estimated / GB:.2f} | {measured / GB:.2f} | {ratio:.2f} |"


if __name__ == "__main__":
    main()
