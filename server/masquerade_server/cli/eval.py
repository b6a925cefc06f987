"""`masquerade eval`: a published persona beside the dense one, on questions that nothing was chosen by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from masquerade_engine.threads import available_cores
from masquerade_masks import SettingError
from masquerade_masks.store import write_json_atomic
from masquerade_server.cli import options
from masquerade_server.cli.eval_summary import print_summary
from masquerade_server.cli.progress import SculptDisplay
from masquerade_server.logs import quiet_transformers
from masquerade_server.published import Published, from_data_dir, from_server

if TYPE_CHECKING:
    from masquerade_pruner.appraisal import Appraisal, AppraisalSettings
    from masquerade_pruner.question_files import QuestionFile
    from masquerade_server.judge import JudgeSettings
    from masquerade_server.settings import Settings

Persona = Annotated[str, typer.Argument(help="A persona's id in the data directory, or on the server of --url.")]
Number = Annotated[int | None, typer.Option("--version", help="The version; by default the one that serves.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for report.json, answers.jsonl and plots (PERSONA-eval).")
]
Quick = Annotated[bool, typer.Option("--quick", help="A few questions of each kind: a try-out, with wide intervals.")]
Only = Annotated[
    str | None,
    typer.Option(help="Some parts, separated by commas: test, discrimination, capability, questions, conversations."),
]
Turns = Annotated[int, typer.Option(help="Hold scripted conversations of so many turns (10 ship).", min=0, max=100)]
Questions = Annotated[
    Path | None,
    typer.Option(help="A persona-vectors file (.json with questions, instruction, eval_prompt) or RoleBench's .jsonl."),
]
LmEval = Annotated[
    str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, such as openbookqa,piqa.")
]
LmEvalInclude = Annotated[
    Path | None, typer.Option("--lm-eval-include", help="A folder with lm-evaluation-harness task files of your own.")
]
Judge = Annotated[bool, typer.Option("--judge", help="Have an LLM score every answer, 0 to 100.")]
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", help="Its OpenAI-compatible endpoint, up to /v1. [MASQUERADE_JUDGE_URL]"),
]
JudgeModel = Annotated[str | None, typer.Option("--judge-model", help="Its model. [MASQUERADE_JUDGE_MODEL]")]
Plots = Annotated[bool, typer.Option("--plots", help="Draw PNG files beside the report (needs matplotlib).")]
Instructions = Annotated[
    Path | None, typer.Option(help="Take test questions from this set in Alpaca format (the built-in one).")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same report on the same machine.", min=0)]
Url = Annotated[str | None, typer.Option("--url", help="Take the persona from a running server; the base is run here.")]


def evaluate(
    persona: Persona,
    version: Number = None,
    out: Out = None,
    quick: Quick = False,
    only: Only = None,
    turns: Turns = 0,
    questions: Questions = None,
    lm_eval: LmEval = None,
    lm_eval_include: LmEvalInclude = None,
    judge: Judge = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    plots: Plots = False,
    instructions: Instructions = None,
    seed: Seed = 0,
    url: Url = None,
    api_key: options.ApiKey = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Measure a published persona: how near its sub-network is to the dense persona, and what it lost.

    \b
    masquerade eval pip --quick                            a first look, in a minute or two
    masquerade eval pip --turns 10 --plots                 with ten-turn conversations
    masquerade eval pip --questions evil.json --judge      other people's questions, and an LLM judge
    masquerade eval pip --lm-eval openbookqa,piqa          general capability through lm-evaluation-harness

    test: KL to the dense persona on its own answers, the gap closed against the better of two masks of the same size
    made without learning, and what the sub-network says by itself. discrimination: does it know its own answer among
    ten? capability: easy multiple choice, dense against sculpted. Every figure has a 95 % bootstrap interval.

    The judge's key is read from MASQUERADE_JUDGE_API_KEY and never shown.
    """
    if plots:
        from masquerade_pruner.plots import require_matplotlib  # noqa: PLC0415  (and torch: seconds of import)

        require_matplotlib()
    judge_settings = _judge_settings(judge, judge_url, judge_model)
    settings = options.settings_of(
        config, data_dir=data_dir, cache_dir=cache_dir, model=model, dtype=dtype, device=device
    )
    found = (
        from_data_dir(settings.data_dir, persona, version)
        if url is None
        else from_server(url, api_key, persona, version)
    )
    if lm_eval_include is not None and not lm_eval_include.is_dir():
        raise SettingError("lm-eval-include", f"there is no folder {lm_eval_include}")
    amounts = _amounts(quick, only, turns, lm_eval, seed)
    asked = _question_file(questions, found.name)
    folder = out or Path(f"{found.persona_id}-eval")
    folder.mkdir(parents=True, exist_ok=True)
    with _display(found.persona_id) as show:
        appraisal = _appraise(found, settings, amounts, asked, instructions, lm_eval_include, show)
        report, rows = appraisal.report, [asdict(one) for one in appraisal.spoken]
        _write(folder, report, rows)  # before the judge, who may fail
        if judge_settings is not None:
            _judge(judge_settings, found, appraisal, rows, asked, show)
            _write(folder, report, rows)
    print_summary(report)
    for path in [folder / "report.json", folder / "answers.jsonl", *(_plot(found, report, folder) if plots else [])]:
        typer.echo(path)


def _judge_settings(wanted: bool, url: str | None, model: str | None) -> JudgeSettings | None:
    if not wanted:
        if url is not None or model is not None:
            raise SettingError("judge", "is not given, and --judge-url and --judge-model say where it is")
        return None
    from masquerade_server.judge import JudgeSettings  # noqa: PLC0415

    return JudgeSettings.resolve(url, model)


def _amounts(quick: bool, only: str | None, turns: int, lm_eval: str | None, seed: int) -> AppraisalSettings:
    from masquerade_pruner.appraisal import QUICK, AppraisalSettings  # noqa: PLC0415

    changes: dict[str, Any] = {"seed": seed, "turns": turns}
    if only is not None:
        changes["parts"] = _names("only", only)
    if lm_eval is not None:
        changes["lm_eval"] = _names("lm-eval", lm_eval)
    return replace(QUICK if quick else AppraisalSettings(), **changes)


def _names(field: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    if not names:
        raise SettingError(field, "names none")
    return names


def _question_file(path: Path | None, persona_name: str) -> QuestionFile | None:
    if path is None:
        return None
    from masquerade_pruner.question_files import load_questions  # noqa: PLC0415

    return load_questions(path, persona_name=persona_name)


Show = Callable[[str, int, int], None]


@contextmanager
def _display(title: str) -> Iterator[Show]:
    with SculptDisplay(title) as display:
        yield display.show


def _appraise(
    found: Published,
    settings: Settings,
    amounts: AppraisalSettings,
    asked: QuestionFile | None,
    instructions: Path | None,
    lm_eval_include: Path | None,
    show: Show,
) -> Appraisal:
    import torch  # noqa: PLC0415

    from masquerade_engine.base import load_base  # noqa: PLC0415
    from masquerade_pruner.appraisal import Subject, appraise  # noqa: PLC0415

    torch.set_num_threads(available_cores())
    quiet_transformers()
    base = load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device=settings.device)
    subject = Subject(
        persona_id=found.persona_id,
        name=found.name,
        version=found.version,
        system_prompt=found.system_prompt,
        subnetwork=found.mask_file.subnetwork,
        recovery=found.mask_file.header.recovery,
        prompt_sha256=found.mask_file.header.prompt_sha256,
        examples=found.examples,
        others={name: other.subnetwork for name, other in found.others.items()},
    )
    return appraise(
        subject,
        base,
        amounts,
        cache_dir=settings.cache_dir,
        instructions=instructions,
        questions=asked,
        lm_eval_include=lm_eval_include,
        on_progress=show,
    )


def _judge(
    settings: JudgeSettings,
    found: Published,
    appraisal: Appraisal,
    rows: list[dict[str, Any]],
    asked: QuestionFile | None,
    show: Show,
) -> None:
    """Put the judge's part into the report and each answer's scores into its row."""
    from masquerade_server.judging import judge  # noqa: PLC0415

    judgement = judge(
        settings,
        appraisal.spoken,
        found.system_prompt,
        eval_prompt=None if asked is None else asked.eval_prompt,
        on_done=lambda criterion, done, total: show(f"judge: {criterion}", done, total),
    )
    appraisal.report["judge"] = judgement.report
    for criterion, scores in judgement.scores.items():
        for row, score in zip(rows, scores, strict=True):
            row[criterion] = score


def _write(folder: Path, report: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "answers.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    write_json_atomic(folder / "report.json", report)


# --- plots


def _plot(found: Published, report: Mapping[str, Any], folder: Path) -> list[Path]:
    """What there is to draw: curves where the sculpt left its history, overlap where the cast has other masks."""
    from masquerade_pruner import plots  # noqa: PLC0415

    masks = {found.persona_id: found.mask_file.subnetwork.mask}
    base = found.mask_file.subnetwork.base
    masks |= {name: other.subnetwork.mask for name, other in found.others.items() if other.subnetwork.base == base}
    drawn = [plots.plot_kept(found.persona_id, masks, folder / "kept.png")]
    history = found.reports.get(found.version, {}).get("learning")
    if history is not None:
        drawn.append(plots.plot_learning(history, folder / "learning.png"))
    if len(masks) > 1:
        drawn.append(plots.plot_overlap(masks, folder / "overlap.png"))
    versions = _qualities(found, report)
    if versions:
        drawn.append(plots.plot_quality(versions, folder / "quality.png"))
    return drawn


def _qualities(found: Published, report: Mapping[str, Any]) -> list[Any]:
    """Every version's KL: this evaluation's of its own version, and of the others what their sculpts reported."""
    from masquerade_pruner.plots import VersionQuality  # noqa: PLC0415

    known = dict(found.reports)
    if "one_turn" in report:
        known[found.version] = dict(report)
    qualities = []
    for number, one in sorted(known.items()):
        figures = one.get("one_turn", {}).get("all")
        if figures is not None and "kl" in figures:  # a remote teacher's pupil has NLL in its place
            rival = figures["baseline_kl"][one["strongest_baseline"]]["mean"]
            sparsity = 1 - one["kept"] / one["intermediate_size"]
            qualities.append(VersionQuality(number, sparsity, figures["kl"], rival))
    return qualities
