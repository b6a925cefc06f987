"""An evaluation's figures as a table: the sub-network's, and what it stands beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Json = Mapping[str, Any]
Row = tuple[str, str, str, str]  # figure, of the sub-network, beside it, difference


def print_summary(report: Json) -> None:
    """Print what an evaluation's report says, part by part."""
    console = Console(highlight=False)
    console.print(
        f"{report['persona']}, version {report['version']}: {report['kept']} of {report['intermediate_size']} neurons "
        f"a layer, recovery {report['recovery']}",
        markup=False,
    )
    if not report["learned_under_this_prompt"]:
        console.print("Its mask was learned under another text than it is served with now.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    for column in ("sculpted", "beside", "difference"):
        table.add_column(column, justify="right")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for task, found in report.get("capability", {}).get("lm_eval", {}).items():
        if "unavailable" in found:
            console.print(f"{task}: {found['unavailable']}", markup=False)


def _rows(report: Json) -> Iterator[Row]:
    for context in ("one_turn", "with_scene"):
        if context in report:
            yield from _fidelity(context, report[context], report["strongest_baseline"])
    yield from _discrimination(report.get("discrimination", {}))
    yield from _capability(report.get("capability", {}))
    yield from _questions(report.get("questions", {}))
    for turn in report.get("conversations", {}).get("turns", ()):
        yield from _turn(turn)
    for criterion in ("in_character", "coherence", "eval_prompt"):
        yield from _judge(criterion, report.get("judge", {}).get(criterion, {}))


def _fidelity(context: str, found: Json, rival: str) -> Iterator[Row]:
    figures = found["all"]
    beside = f"{_mean(figures['baseline_kl'][rival])} {rival}"
    yield f"{context}: KL to dense", _span(figures["kl"]), beside, f"gap closed {_span(figures['gap_closed'])}"
    yield f"{context}: top-1 agreement", _span(figures["top1_agreement"]), "", ""
    yield from _free_running(context, found["free_running"])


def _free_running(context: str, found: Json) -> Iterator[Row]:
    if found["num_questions"]:
        of_dense, of_sculpted = found["dense_nll_of_dense"], found["dense_nll_of_sculpted"]
        yield f"{context}: dense NLL of its answers", _mean(of_sculpted), f"{_mean(of_dense)} dense", ""
        for name in ("stop_rate", "repetition"):
            values = found[name]
            yield f"{context}: {name}", f"{values['sculpted']:.3f}", f"{values['dense']:.3f} dense", ""


def _discrimination(found: Json) -> Iterator[Row]:
    for name in ("dense_with_prompt", "dense_without_prompt", "swapped_mask"):
        if name in found:
            ours, other = found["sculpted"]["top1"], found[name]["top1"]
            yield f"knows its own answer of {found['num_candidates']}", _mean(ours), f"{_mean(other)} {name}", ""


def _capability(found: Json) -> Iterator[Row]:
    for context in ("plain", "in_persona"):
        if context in found:
            yield _dropped(f"multiple choice, {context}", found[context])
    for task, metrics in found.get("lm_eval", {}).items():
        for metric, figures in metrics.items():
            if isinstance(figures, dict):
                yield _dropped(f"{task}: {metric}", figures)


def _dropped(figure: str, found: Json) -> Row:
    return figure, _mean(found["sculpted"]), f"{_mean(found['dense'])} dense", f"drop {_span(found['drop'])}"


def _questions(found: Json) -> Iterator[Row]:
    for context in ("one_turn", "with_scene"):
        if context in found:
            yield f"questions, {context}: KL", _span(found[context]["kl"]), "", ""
            yield from _free_running(f"questions, {context}", found[context]["free_running"])


def _turn(turn: Json) -> Iterator[Row]:
    number, of_dense = turn["turn"], f"{_mean(turn['dense_nll_of_dense'])} dense"
    yield f"turn {number}: KL", _span(turn["kl"]), "", ""
    yield f"turn {number}: dense NLL of its answers", _mean(turn["dense_nll_of_sculpted"]), of_dense, ""


def _judge(criterion: str, parts: Json) -> Iterator[Row]:
    for part, found in parts.items():
        if isinstance(found, dict):
            dense = f"{_mean(found['dense'])} dense"
            yield f"judge, {criterion}, {part}", _mean(found["sculpted"]), dense, _span(found["difference"])


def _mean(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f}"


def _span(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
