"""The whole pipeline on a tiny base: stages, checkpoints, cancellation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine.base import Base, load_base
from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import InsufficientMemory, SculptCancelled, SettingError
from masquerade_pruner import PRESETS, Execution, Progress, SculptResult, SculptSpec, sculpt
from masquerade_pruner.estimate import estimate
from masquerade_pruner.examples import read_examples

TEXT = "You are a tester of bridges who speaks in short, heavy sentences and distrusts rope."


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Alpaca set whose topics fall into all three splits."""
    rows = [
        {"instruction": f"{word} {topic} {word[::-1]}?", "input": "", "output": "Yes.", "topic": topic}
        for topic in (f"topic{index}" for index in range(24))
        for word in ("alpha", "brick", "crane")
    ]
    file = tmp_path_factory.mktemp("instructions") / "small.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="session")
def run_sculpt(
    tiny_base: Base, instructions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SculptResult]:
    cache_dir = tmp_path_factory.mktemp("sculpt-cache")

    def run(workdir: Path, *, sparsity: float = 0.5, **keywords: Any) -> SculptResult:
        spec = SculptSpec("tester", "Tester", TEXT, sparsity=sparsity, preset="smoke", instructions=instructions)
        return sculpt(spec, tiny_base, workdir, cache_dir=cache_dir, **keywords)

    return run


@pytest.fixture(scope="session")
def finished(run_sculpt: Callable[..., SculptResult], tmp_path_factory: pytest.TempPathFactory) -> SculptResult:
    return run_sculpt(tmp_path_factory.mktemp("finished"))


def test_result_is_a_servable_subnetwork_with_its_report(finished: SculptResult, tiny_base: Base) -> None:
    assert finished.subnetwork.base == tiny_base.fingerprint
    assert finished.subnetwork.mask.kept == finished.report["kept"]
    assert TEXT in finished.system_prompt
    assert set(finished.seconds) == {"select", "answer", "learn", "evaluate"}
    one_turn = finished.report["one_turn"]["all"]
    assert one_turn["kl"]["mean"] > 0
    assert set(one_turn["baseline_kl"]) == {"wanda", "fisher"}
    assert finished.report["strongest_baseline"] in one_turn["baseline_kl"]
    json.dumps(finished.report, allow_nan=False)
    json.dumps(finished.settings, allow_nan=False)


def test_examples_are_only_from_the_training_split(finished: SculptResult) -> None:
    examples = read_examples(finished.examples_path)
    assert examples
    assert {one.split for one in examples} == {"train"}
    assert all(one.sensitivity is not None for one in examples)
    for one in examples:
        assert one.ended or len(one.answer) == PRESETS["smoke"].answer_tokens


def test_progress_visits_every_stage_in_order(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    news: list[Progress] = []
    run_sculpt(tmp_path, progress=news.append)
    stages = list(dict.fromkeys(one.stage for one in news))
    assert stages == ["select", "answer", "learn", "evaluate"]
    assert all(0 <= one.completed <= one.total for one in news)
    assert any(one.loss is not None for one in news if one.stage == "learn")


@pytest.mark.parametrize("stop_at", ["answer", "learn", "evaluate"])
def test_a_stopped_job_resumes_to_the_same_mask(
    run_sculpt: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path, stop_at: str
) -> None:
    reached: list[str] = []
    with pytest.raises(SculptCancelled):
        run_sculpt(
            tmp_path,
            progress=lambda news: reached.append(news.stage),
            cancelled=lambda: reached.count(stop_at) >= 3,
        )
    resumed: list[str] = []
    result = run_sculpt(tmp_path, progress=lambda news: resumed.append(news.stage))
    assert "select" not in resumed
    assert result.subnetwork.digest == finished.subnetwork.digest


def test_another_sparsity_learns_from_the_same_answers(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    wide = run_sculpt(tmp_path, sparsity=0.25)
    news: list[str] = []
    narrow = run_sculpt(tmp_path, sparsity=0.5, progress=lambda one: news.append(one.stage))
    assert narrow.subnetwork.mask.kept < wide.subnetwork.mask.kept
    assert "select" not in news


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 0.95, float("nan"), float("inf")])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(SettingError, match="sparsity") as refused:
        SculptSpec("p", "P", TEXT, sparsity=sparsity)
    assert refused.value.field == "sparsity"


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"text": " \n"}, "text"),
        ({"text": "x" * 20_000}, "text"),
        ({"name": ""}, "name"),
        ({"preset": "quick"}, "preset"),
        ({"recovery": "magic"}, "recovery"),
        ({"teacher": "oracle"}, "teacher"),
    ],
)
def test_bad_specs_name_their_field(changed: dict[str, str], field: str) -> None:
    with pytest.raises(SettingError) as refused:
        SculptSpec(**({"persona_id": "p", "name": "P", "text": TEXT} | changed))
    assert refused.value.field == field


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_any_way_to_run_learns_the_same_mask(
    make_tiny_base: Callable[..., Path], instructions: Path, tmp_path: Path, model_type: str
) -> None:
    """Adam's first step is the gradient's sign: rounding turns a few neurons that stand at the threshold."""
    directory = make_tiny_base(tmp_path / "base", model_type)
    base = load_base(str(directory), cache_dir=tmp_path / "cache", dtype="fp32", device="cpu")
    spec = SculptSpec("tester", "Tester", TEXT, sparsity=0.5, preset="smoke", instructions=instructions)

    def run(name: str, execution: Execution) -> SculptResult:
        answers = tmp_path / "answers"  # one set of answers: the engine's are sampled the same anyway
        return sculpt(
            spec, base, tmp_path / name, cache_dir=tmp_path / "cache", answers_dir=answers, execution=execution
        )

    plain, small = run("plain", Execution("off", 16)), run("small", Execution("on", 2))
    assert plain.settings["plan"] == {
        "device": "cpu", "dtype": "float32", "micro_batch": 16, "checkpointing": False
    }  # fmt: skip
    assert (small.settings["plan"]["micro_batch"], small.settings["plan"]["checkpointing"]) == (2, True)
    losses, wanted = (one.report["learning"]["loss"] for one in (small, plain))
    assert losses[0] == pytest.approx(wanted[0], abs=2e-5)  # of five decimals
    assert losses == pytest.approx(wanted, rel=0.01)
    masks = [one.subnetwork.mask.to_dense() for one in (plain, small)]
    assert (masks[0] != masks[1]).mean() < 0.02


def test_the_plan_is_told_and_kept_over_a_restart(
    run_sculpt: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path
) -> None:
    reached: list[Progress] = []
    with pytest.raises(SculptCancelled):
        run_sculpt(
            tmp_path,
            execution=Execution("on", 4),
            progress=reached.append,
            cancelled=lambda: any(one.loss is not None for one in reached),
        )
    assert any("4 branches a pass, checkpointing" in one.message for one in reached)
    resumed = run_sculpt(tmp_path)  # left to it: the steps go on as they began
    assert (resumed.settings["plan"]["micro_batch"], resumed.settings["plan"]["checkpointing"]) == (4, True)
    assert (finished.settings["plan"]["micro_batch"], finished.settings["plan"]["checkpointing"]) == (16, False)


def test_what_does_not_fit_is_refused_before_anything_is_done(
    run_sculpt: Callable[..., SculptResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(free=100_000_000, total=8_000_000_000)
    monkeypatch.setattr(sys.modules["masquerade_pruner.estimate"], "device_memory", lambda device: memory)
    news: list[Progress] = []
    with pytest.raises(InsufficientMemory, match=r"needs about .* GB, this device \(cpu\) has 0.1 GB free") as refused:
        run_sculpt(tmp_path, progress=news.append)
    assert refused.value.available_bytes == memory.free
    assert not news


def test_one_copy_of_the_weights_at_a_time_gives_the_same_mask(
    run_sculpt: Callable[..., SculptResult],
    finished: SculptResult,
    tmp_path: Path,
    tiny_base: Base,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where two do not fit, the learner's weights go before the engine's come."""
    built: list[str] = []
    plan_for = sys.modules["masquerade_pruner.sculpt"].plan_for  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sys.modules["masquerade_pruner.sculpt"],
        "plan_for",
        lambda *arguments: replace(plan_for(*arguments), keeps_learner=False),
    )
    build = Base.build_model
    monkeypatch.setattr(Base, "build_model", lambda self, *rest: built.append("model") or build(self, *rest))
    result = run_sculpt(tmp_path)
    assert result.subnetwork.digest == finished.subnetwork.digest
    assert len(built) == 5  # select, the engine, learn and evaluate, the engine again, its answers' likelihood


def test_a_job_behind_others_is_measured_against_all_of_the_memory(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(free=100_000_000, total=8_000_000_000)
    monkeypatch.setattr(sys.modules["masquerade_pruner.estimate"], "device_memory", lambda device: memory)
    spec = SculptSpec("p", "P", TEXT)
    with pytest.raises(InsufficientMemory):
        estimate(spec, tiny_base)
    assert estimate(spec, tiny_base, behind_others=True)["available_bytes"] == memory.total


def test_estimate_grows_with_effort(tiny_base: Base) -> None:
    seconds = [
        estimate(SculptSpec("p", "P", TEXT, preset=preset), tiny_base)["total_seconds"]
        for preset in ("smoke", "default", "thorough")
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", [Execution(), Execution("on", 2)])
def test_a_sculpt_on_a_gpu(tiny_base_dir: Path, instructions: Path, tmp_path: Path, execution: Execution) -> None:
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path / "cache", device="cuda:0")
    spec = SculptSpec("tester", "Tester", TEXT, sparsity=0.5, preset="smoke", instructions=instructions)
    news: list[Progress] = []
    torch.cuda.reset_peak_memory_stats()
    result = sculpt(
        spec, base, tmp_path / "work", cache_dir=tmp_path / "cache", execution=execution, progress=news.append
    )
    assert result.settings["plan"]["device"] == "cuda:0"
    assert result.settings["plan"]["dtype"] == "bfloat16"
    assert result.report["one_turn"]["all"]["kl"]["mean"] > 0
    assert torch.cuda.max_memory_allocated() <= estimate(spec, base, execution)["peak_bytes"]
