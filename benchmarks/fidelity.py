"""Held-out fidelity of default sculpts, and where their time goes.

    python benchmarks/fidelity.py                                 # the three ready personas, at 25 % and 50 %
    python benchmarks/fidelity.py examples/personas/*.txt --sparsity 0.25

Each persona is sculpted at every sparsity from one set of answers and measured on the test split, whose topics nothing
was trained or chosen on. The baseline is the better of a Wanda-style and a Fisher mask of the same size from the same
examples, chosen on validation. Gap closed is 1 - KL(ours) / KL(baseline), with a 95 % interval from a paired bootstrap
over questions, nested in personas. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from sculpts import personas, sculpted, usual_workdir

from masquerade_engine.base import load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import MaskFile, MaskHeader, mask_file, utc_now
from masquerade_pruner import SculptResult, SculptSpec
from masquerade_pruner.bootstrap import gap_closed


def main() -> None:
    """Sculpt, collect, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(cache_dir=options.workdir / "cache")
    results: dict[tuple[str, float], SculptResult] = {}
    for persona_id, name, text in personas(options.personas):
        for sparsity in options.sparsity:
            spec = SculptSpec(persona_id, name, text, sparsity=sparsity, preset=options.preset)
            result = sculpted(spec, base, options.workdir)
            results[persona_id, sparsity] = result
            _keep(options.workdir / "masks", spec, result)
    table = _table(results, options.sparsity)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--workdir", type=Path, default=usual_workdir(quick=False))
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def _keep(folder: Path, spec: SculptSpec, result: SculptResult) -> None:
    """Mask and report, in the form that the ready personas ship in."""
    folder.mkdir(parents=True, exist_ok=True)
    header = MaskHeader(spec.persona_id, 1, result.recovery, result.prompt_sha256, result.settings, utc_now())
    name = f"{spec.persona_id}-{spec.sparsity}"
    mask_file.write(folder / f"{name}.safetensors", MaskFile(result.subnetwork, header))
    (folder / f"{name}.report.json").write_text(json.dumps(result.report, indent=1, ensure_ascii=False), "utf-8")


def _table(results: dict[tuple[str, float], SculptResult], sparsities: list[float]) -> str:
    lines = [
        "# Held-out fidelity of default sculpts",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        "KL in nats a token over the test questions; gap closed over the better baseline, with its 95 % interval.",
        "",
        "| persona | sparsity | KL ours | KL baseline | which | gap closed | sensitive | with scene | top-1 | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(persona, sparsity, result.report) for (persona, sparsity), result in results.items()]
    lines += ["", "| sparsity | personas | gap closed, mean | 95 % interval |", "| --- | --- | --- | --- |"]
    for sparsity in sparsities:
        reports = [result.report for (_, one), result in results.items() if one == sparsity]
        closed = gap_closed([_kl(report, None) for report in reports], [_kl(report, "strongest") for report in reports])
        lines.append(f"| {sparsity} | {len(reports)} | {closed.mean:.1%} | {closed.low:.1%} to {closed.high:.1%} |")
    lines += ["", "| persona | sparsity | select | answer | learn | evaluate | total s |", "|" + " --- |" * 7]
    for (persona, sparsity), result in results.items():
        spent = [result.seconds[stage] for stage in ("select", "answer", "learn", "evaluate")]
        cells = " | ".join(f"{seconds:.0f}" for seconds in (*spent, sum(spent)))
        lines.append(f"| {persona} | {sparsity} | {cells} |")
    return "\n".join([*lines, ""])


def _row(persona: str, sparsity: float, report: dict[str, Any]) -> str:
    overall, sensitive = report["one_turn"]["all"], report["one_turn"]["sensitive"]
    scene = report["with_scene"]["all"]
    rival = report["strongest_baseline"]
    return (
        f"| {persona} | {sparsity} | {overall['kl']['mean']:.3f} | {overall['baseline_kl'][rival]['mean']:.3f} "
        f"| {rival} | {_gap(overall)} | {_gap(sensitive)} | {_gap(scene)} "
        f"| {overall['top1_agreement']['mean']:.3f} | {sum(report['seconds'].values()):.0f} |"
    )


def _gap(group: dict[str, Any]) -> str:
    closed = group["gap_closed"]
    return f"{closed['mean']:.1%} ({closed['low']:.1%} to {closed['high']:.1%})"


def _kl(report: dict[str, Any], baseline: str | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = report["one_turn"]["per_question"]
    return np.array(rows["kl"] if baseline is None else rows["baselines"][report["strongest_baseline"]])


if __name__ == "__main__":
    main()
