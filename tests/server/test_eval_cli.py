"""`masquerade eval` from end to end: published random masks on a tiny base, a judge on a loopback port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_judge import judge_server
from running_server import RunningServer, add_version, servers, settings_for
from typer.testing import CliRunner, Result

from masquerade_masks import NoMaskYet, SettingError, VersionNotFound
from masquerade_pruner import appraisal, sensitivity
from masquerade_pruner.instructions import InstructionSet, load_instructions
from masquerade_server import cli

KEY = "sk-very-secret-0123456789"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def inn(make_tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with `mira` (two versions), `tom` (one) and `plain` (none) on a base with room for bytes."""
    directory = make_tiny_base(tmp_path_factory.mktemp("inn") / "base", max_position_embeddings=2048)
    with servers() as start:
        running = start(settings_for(directory.parent / "data", directory))
        for name, seeds in (("mira", (1, 2)), ("tom", (3,))):
            for seed in seeds:
                add_version(running, name, name.title(), f"{name.title()} keeps an inn.", seed)
        created = {"name": "Plain", "id": "plain", "text": "No mask.", "sculpt": False}
        assert running.client.post("/personas", json=created).status_code == 201
        # Examples are text in the server's tests; the pruner's own hold tokens.
        for path in running.state.settings.data_dir.rglob("examples.jsonl"):
            path.unlink()
        yield running


@pytest.fixture
def run(inn: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("mira", "--quick")`: the command over the inn's data directory, with few questions."""
    every, references = load_instructions(), sensitivity.load_references()
    few = InstructionSet(every.train[::60], every.validation[::12], every.test[::20])
    short = [replace(one, text=one.text[:60]) for one in references[:2]]
    monkeypatch.setattr(appraisal, "load_instructions", lambda path=None: few)
    monkeypatch.setattr(appraisal, "load_references", lambda: short)
    monkeypatch.setattr(sensitivity, "load_references", lambda: short)
    monkeypatch.setattr(
        appraisal, "QUICK", replace(appraisal.QUICK, answer_tokens=8, num_test=4, num_importance=4, num_choices=4)
    )
    settings = inn.state.settings
    monkeypatch.setenv("MASQUERADE_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("MASQUERADE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MASQUERADE_MODEL", settings.model)
    monkeypatch.setenv("MASQUERADE_DTYPE", "fp32")
    monkeypatch.setenv("COLUMNS", "160")

    def command(*arguments: Any) -> Result:
        return CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])

    return command


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_help_teaches(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "masquerade eval pip --turns 10" in result.output
    assert "MASQUERADE_JUDGE_API_KEY" in result.output


def test_a_whole_evaluation_with_a_judge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_JUDGE_API_KEY", KEY)
    questions = tmp_path / "pride.json"
    questions.write_text(
        json.dumps(
            {"questions": ["Who won?"], "instruction": [{"pos": "Be proud."}], "eval_prompt": "{question}{answer}"}
        )
    )
    out = tmp_path / "out"
    with judge_server(lambda prompt, number: (200, f"Score: {number % 100}")) as judge:
        flags = ("--judge", "--judge-url", judge.url, "--judge-model", "m", "--turns", 1, "--questions", questions)
        result = run("mira", "--quick", "-o", out, *flags)
    assert result.exit_code == 0, result.output
    report = report_of(out)
    assert report["format"] == "masquerade.eval/1"
    assert (report["persona"], report["version"]) == ("mira", 2)
    assert report["discrimination"]["swapped_mask_of"] == "tom"
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == len(judge.bodies) - len([row for row in rows if row["part"].startswith("questions/")]) - len(
        rows
    )
    assert all(row["in_character"] is not None and row["coherence"] is not None for row in rows)
    assert report["judge"]["in_character"]["num_judged"] == len(rows)
    assert "gap closed" in result.output
    assert "turn 1: KL" in result.output
    written = "".join(path.read_text() for path in out.iterdir())
    assert KEY not in result.output + written
    assert set(judge.keys) == {f"Bearer {KEY}"}


def test_a_version_and_a_part(run: Run, tmp_path: Path) -> None:
    result = run("mira", "--quick", "--version", 1, "--only", "capability", "-o", tmp_path / "v1")
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "v1")
    assert report["version"] == 1
    assert "one_turn" not in report
    assert "multiple choice, in_persona" in result.output


def test_a_running_server_s_persona_is_the_same(run: Run, inn: RunningServer, tmp_path: Path) -> None:
    for name, flags in (("here", ()), ("there", ("--url", inn.url, "--data-dir", tmp_path))):
        result = run("mira", "--quick", "--only", "test,discrimination", "-o", tmp_path / name, *flags)
        assert result.exit_code == 0, result.output
    here, there = report_of(tmp_path / "here"), report_of(tmp_path / "there")
    for key in ("digest", "prompt_sha256", "one_turn", "discrimination"):
        assert here[key] == there[key]


def test_a_refusing_judge_leaves_the_measured_report(run: Run, tmp_path: Path) -> None:
    with judge_server(lambda prompt, number: (403, {"error": {"message": "no"}})) as judge:
        flags = ("--judge", "--judge-url", judge.url, "--judge-model", "m")
        result = run("tom", "--quick", "--only", "test", "-o", tmp_path / "out", *flags)
    assert "403" in str(result.exception)
    assert "one_turn" in report_of(tmp_path / "out")


def test_plots(run: Run, inn: RunningServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("mira", "--quick", "--only", "test", "--plots", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"kept.png", "overlap.png", "quality.png"}  # the inn's reports hold no learning history


def test_what_cannot_be_evaluated_is_a_sentence(run: Run, tmp_path: Path) -> None:
    assert isinstance(run("plain").exception, NoMaskYet)
    assert isinstance(run("mira", "--version", 9).exception, VersionNotFound)
    for arguments, field in (
        (("mira", "--only", "all"), "only"),
        (("mira", "--only", ","), "only"),
        (("mira", "--data-dir", tmp_path), "data-dir"),
        (("mira", "--judge"), "judge-url"),
        (("mira", "--judge-model", "m"), "judge"),
        (("mira", "--questions", tmp_path / "none.json"), "questions"),
        (("mira", "--lm-eval-include", tmp_path / "none"), "lm-eval-include"),
    ):
        refused = run(*arguments, "-o", tmp_path / "out").exception
        assert isinstance(refused, SettingError), arguments
        assert refused.field == field
    assert not (tmp_path / "out" / "report.json").exists()
