"""The whole pipeline on a tiny base: stages, checkpoints, cancellation."""

from __future__ import annotations

import json
import shutil
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
from masquerade_pruner.recovery import Recovery

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

    def run(workdir: Path, *, sparsity: float = 0.5, recovery: Recovery = "none", **keywords: Any) -> SculptResult:
        spec = SculptSpec(
            "tester", "Tester", TEXT, sparsity=sparsity, preset="smoke", recovery=recovery, instructions=instructions
        )
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


@pytest.fixture(scope="session")
def recover_finished(run_sculpt: Callable[..., SculptResult], finished: SculptResult) -> Callable[..., SculptResult]:
    """`recover_finished(workdir, recovery)`: in a copy of the finished sculpt's directory, with another recovery."""

    def run(workdir: Path, recovery: str, **keywords: Any) -> SculptResult:
        if not workdir.exists():
            shutil.copytree(finished.examples_path.parents[1], workdir)
        return run_sculpt(workdir, recovery=recovery, **keywords)

    return run


@pytest.mark.parametrize("recovery", ["vectors", "lora", "full"])
def test_recovery_goes_on_from_the_same_mask(
    recover_finished: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path, recovery: str
) -> None:
    news: list[Progress] = []
    result = recover_finished(tmp_path / "work", recovery, progress=news.append)
    assert [one for one in dict.fromkeys(one.stage for one in news) if one != "answer"] == ["recover", "evaluate"]
    assert {one.total for one in news if one.stage == "recover" and one.completed} == {3}  # of few examples
    assert result.subnetwork.mask == finished.subnetwork.mask
    told, before = result.report["recovery"], finished.report["one_turn"]["all"]
    assert (result.recovery, told["kind"], told["applied"]) == (recovery,) * 3
    assert [step for step, _ in told["validation"]] == ([2, 3] if recovery == "full" else [0, 2, 3])
    assert min(figure for _, figure in told["validation"]) < told["unrecovered"]
    assert told["bytes"] > 0
    assert result.settings["recovery"]["kind"] == recovery
    assert result.report["one_turn"]["all"]["kl"] != before["kl"]
    assert result.report["one_turn"]["all"]["baseline_kl"] == before["baseline_kl"]
    json.dumps(result.report, allow_nan=False)


def test_vectors_are_in_the_subnetwork_and_weights_are_attached(
    recover_finished: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path
) -> None:
    vectors, lora, full = (recover_finished(tmp_path / one, one) for one in ("vectors", "lora", "full"))
    assert finished.attached is None
    assert vectors.attached is None
    for one in (vectors, lora):
        assert one.subnetwork.gain is not None
        assert one.subnetwork.bias is not None
        assert one.subnetwork.digest != finished.subnetwork.digest
    assert full.subnetwork.digest == finished.subnetwork.digest
    assert lora.attached is not None
    assert (lora.attached["kind"], lora.attached["rank"], lora.attached["alpha"]) == ("lora", 16, 16.0)
    assert lora.attached["tensors"]["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].shape == (96, 16)
    assert full.attached is not None
    assert full.attached["tensors"]["model.layers.2.mlp.down_proj.weight"].shape == (32, full.subnetwork.mask.kept)
    assert vectors.report["free_running"]["num_questions"] > 0
    assert lora.report["free_running"] is full.report["free_running"] is None  # nothing here can sample from them


def test_a_job_stopped_while_recovering_resumes_to_the_same_vectors(
    recover_finished: Callable[..., SculptResult], tmp_path: Path
) -> None:
    whole = recover_finished(tmp_path / "whole", "vectors")
    reached: list[str] = []
    with pytest.raises(SculptCancelled):
        recover_finished(
            tmp_path / "stopped",
            "vectors",
            progress=lambda news: reached.append(news.stage),
            cancelled=lambda: reached.count("recover") >= 3,
        )
    assert recover_finished(tmp_path / "stopped", "vectors").subnetwork.digest == whole.subnetwork.digest


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


def test_estimate_counts_recovery(tiny_base: Base) -> None:
    none, vectors, full = (
        estimate(SculptSpec("p", "P", TEXT, recovery=recovery), tiny_base) for recovery in ("none", "vectors", "full")
    )
    assert "recover" not in none["seconds"]
    assert vectors["total_seconds"] == pytest.approx(none["total_seconds"] + vectors["seconds"]["recover"], abs=0.2)
    assert full["peak_bytes"] > vectors["peak_bytes"] == none["peak_bytes"]
