"""The whole pipeline on a tiny base: stages, checkpoints, cancellation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from masquerade_engine.base import Base
from masquerade_masks import Mask, SculptCancelled, SettingError
from masquerade_pruner import PRESETS, Progress, SculptResult, SculptSpec, sculpt
from masquerade_pruner.estimate import estimate
from masquerade_pruner.examples import read_examples
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.prior import prior_path

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
        return sculpt(spec, tiny_base, workdir, **{"cache_dir": cache_dir, **keywords})

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


def test_a_mask_is_pulled_towards_its_cast(
    run_sculpt: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path
) -> None:
    alone = finished.subnetwork.mask
    order = np.random.default_rng(0).random((alone.num_layers, alone.intermediate_size)).argsort(axis=1)
    other = Mask.from_kept_indices(order[:, : alone.kept], alone.intermediate_size)
    together = run_sculpt(tmp_path, cast=[other]).subnetwork.mask
    assert _jaccard(together, other) > _jaccard(alone, other) + 0.02


def test_learning_starts_from_the_prior(
    run_sculpt: Callable[..., SculptResult], finished: SculptResult, tiny_base: Base, tmp_path: Path
) -> None:
    shape, kept = tiny_base.shape, finished.subnetwork.mask.kept
    scores = torch.rand(shape.num_layers, shape.intermediate_size, generator=torch.Generator().manual_seed(1))
    path = prior_path(tiny_base, tmp_path)
    path.parent.mkdir()
    save_file({str(kept): scores * 100}, path, {"format": "masquerade.prior/1", "base": tiny_base.fingerprint})
    learned = run_sculpt(tmp_path / "work", cache_dir=tmp_path).subnetwork.mask  # a few steps move nothing by 100
    assert np.array_equal(learned.to_dense(), top_k_mask(scores, kept).numpy().astype(bool))


def _jaccard(one: Mask, other: Mask) -> float:
    first, second = one.to_dense(), other.to_dense()
    return float((first & second).sum() / (first | second).sum())


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


def test_estimate_grows_with_effort(tiny_base: Base) -> None:
    seconds = [
        estimate(SculptSpec("p", "P", TEXT, preset=preset), tiny_base)["total_seconds"]
        for preset in ("smoke", "default", "thorough")
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]
