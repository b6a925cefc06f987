"""The whole pipeline on a tiny base: stages, checkpoints, cancellation."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masquerade_engine.base import Base, load_base
from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import InsufficientMemory, Mask, SculptCancelled, SettingError, TeacherError
from masquerade_pruner import (
    PRESETS,
    Chat,
    Execution,
    Progress,
    Reply,
    SculptResult,
    SculptSettings,
    SculptSpec,
    sculpt,
)
from masquerade_pruner.estimate import estimate
from masquerade_pruner.examples import Example, read_examples
from masquerade_pruner.mask_learning import MaskLearner, top_k_mask
from masquerade_pruner.prior import Prior, SharedRecovery, prior_path, write_prior
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

    def run(
        workdir: Path,
        *,
        sparsity: float = 0.5,
        recovery: Recovery = "none",
        answers: str = "base",
        numbers: SculptSettings | None = None,
        **keywords: Any,
    ) -> SculptResult:
        spec = SculptSpec(
            "tester",
            "Tester",
            TEXT,
            sparsity=sparsity,
            preset="smoke",
            recovery=recovery,
            teacher=answers,
            instructions=instructions,
            numbers=numbers,
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
    assert finished.report["baselines"] == ["wanda", "flap"]
    assert list(one_turn["baseline_kl"]) == [finished.report["strongest_baseline"]]
    assert (finished.report["teacher"], finished.report["measure"]) == ("base", "kl")
    assert finished.settings["loss"] == "kl"
    counts = finished.report["synthesis"]
    assert counts["asked"] == counts["answered"] > 0
    assert counts["dropped"] == {}
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
    assert {one.total for one in news if one.stage == "recover" and one.completed} == {
        3 + 3 * (recovery == "full")  # steps, of few examples, and the layers that own weights are solved for in
    }
    assert result.subnetwork.mask == finished.subnetwork.mask
    told, before = result.report["recovery"], finished.report["one_turn"]["all"]
    assert (result.recovery, told["kind"], told["applied"]) == (recovery,) * 3
    assert [step for step, _ in told["validation"]] == [0, 2, 3]
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
    assert finished.subnetwork.weights is None
    assert vectors.subnetwork.weights is None
    for one in (vectors, lora):
        assert one.subnetwork.gain is not None
        assert one.subnetwork.bias is not None
        assert one.subnetwork.digest != finished.subnetwork.digest
    updates, own = lora.subnetwork.weights, full.subnetwork.weights
    assert updates is not None
    assert (updates.kind, updates.rank, updates.alpha) == ("lora", 16, 16.0)
    assert updates.tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].shape == (96, 16)
    assert own is not None
    assert own.tensors["model.layers.2.mlp.down_proj.weight"].shape == (32, full.subnetwork.mask.kept)
    assert full.subnetwork.gain is None
    for one in (vectors, lora, full):
        assert one.report["free_running"]["num_questions"] > 0


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
    together = run_sculpt(tmp_path, cast=[other], numbers=replace(PRESETS["smoke"], cast_pull=4.2)).subnetwork.mask
    assert _jaccard(together, other) > _jaccard(alone, other) + 0.02


def test_other_numbers_than_a_presets_learn_from_the_same_answers(
    recover_finished: Callable[..., SculptResult], finished: SculptResult, tmp_path: Path
) -> None:
    numbers = replace(
        PRESETS["smoke"], cast_pull=0.0, scratch_learning_rate=0.05, num_test_scenes=4, num_free_running=0
    )
    stages: list[tuple[str, int]] = []
    result = recover_finished(
        tmp_path / "work", "none", numbers=numbers, progress=lambda news: stages.append((news.stage, news.completed))
    )
    assert {stage for stage, _ in stages} == {"answer", "learn", "evaluate"}
    assert ("answer", 1) not in stages  # none was asked for
    assert (result.settings["preset"], finished.settings["preset"]) == ("custom", "smoke")
    assert result.settings["scratch_learning_rate"] == 0.05
    assert result.subnetwork.mask != finished.subnetwork.mask
    assert "free_running" in finished.report
    assert "free_running" not in result.report


def test_learning_starts_from_the_prior(
    run_sculpt: Callable[..., SculptResult], finished: SculptResult, tiny_base: Base, tmp_path: Path
) -> None:
    shape, kept = tiny_base.shape, finished.subnetwork.mask.kept
    still = replace(PRESETS["smoke"], learning_rate=1e-9)
    for seed in (1, 2):  # another prior in the same directory is another start
        scores = torch.rand(shape.num_layers, shape.intermediate_size, generator=torch.Generator().manual_seed(seed))
        write_prior(prior_path(tiny_base, tmp_path), tiny_base, Prior({kept: scores}), "")
        learned = run_sculpt(tmp_path / "work", cache_dir=tmp_path, numbers=still).subnetwork.mask
        assert np.array_equal(learned.to_dense(), top_k_mask(scores, kept).numpy().astype(bool))


def test_recovery_starts_from_the_priors(
    recover_finished: Callable[..., SculptResult], finished: SculptResult, tiny_base: Base, tmp_path: Path
) -> None:
    """What one sculpt recovered is a good start for the same sculpt again."""
    first = recover_finished(tmp_path / "first", "vectors")
    kept = torch.from_numpy(first.subnetwork.mask.kept_indices().astype(np.int64))
    assert first.subnetwork.gain is not None
    assert first.subnetwork.bias is not None
    vectors = {"gain": torch.tensor(first.subnetwork.gain), "bias": torch.tensor(first.subnetwork.bias)}
    scores = {kept.shape[1]: torch.from_numpy(finished.subnetwork.mask.to_dense()).float()}
    prior = Prior(scores, recoveries={(kept.shape[1], "vectors"): SharedRecovery(kept, vectors)})
    write_prior(prior_path(tiny_base, tmp_path), tiny_base, prior, "")
    still = replace(PRESETS["smoke"], learning_rate=1e-9)
    second = recover_finished(tmp_path / "second", "vectors", cache_dir=tmp_path, numbers=still)
    assert first.report["recovery"]["start"] != "prior"
    assert second.report["recovery"]["start"] == "prior"


def test_from_a_prior_dropped_neurons_learn_alone_and_from_importances_all(
    run_sculpt: Callable[..., SculptResult],
    finished: SculptResult,
    tiny_base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape, kept = tiny_base.shape, finished.subnetwork.mask.kept
    scores = torch.rand(shape.num_layers, shape.intermediate_size, generator=torch.Generator().manual_seed(1))
    write_prior(prior_path(tiny_base, tmp_path), tiny_base, Prior({kept: scores}), "")
    learned: list[tuple[bool, float]] = []

    class Watched(MaskLearner):
        def step(self, examples: Sequence[Example]) -> float:
            loss = super().step(examples)
            assert self.scores.grad is not None
            stood_still = bool((self.scores.grad == 0).sum(dim=1).ge(kept).all())
            learned.append((stood_still, self._learning_rate))
            return loss

    monkeypatch.setattr(sys.modules["masquerade_pruner.sculpt"], "MaskLearner", Watched)
    for start in ("prior", "importance"):
        numbers = replace(PRESETS["smoke"], start=start, steps=2)
        run_sculpt(tmp_path / start, cache_dir=tmp_path, numbers=numbers)
    settings = PRESETS["smoke"]
    assert learned == [(True, settings.learning_rate)] * 2 + [(False, settings.scratch_learning_rate)] * 2


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


# --- a remote teacher


class Rewriter:
    """A chat model in this process: it says a sentence of its own for each question, and `spoil` may spoil some."""

    name = "scribe-7b"
    digest = "5" * 64

    def __init__(self, spoil: Callable[[int], str | None] = lambda number: None) -> None:
        self.asked: list[str] = []
        self._spoil = spoil

    def replies(
        self, chats: Sequence[Chat], *, usable: Callable[[Reply], bool], between: Callable[[], None]
    ) -> Generator[Reply, None, None]:
        for chat in chats:
            between()
            spoiled = self._spoil(len(self.asked))
            text = f"No rope {chat.seed % 7}." if spoiled is None else spoiled
            self.asked.append(chat.id)
            yield Reply(chat.id, text, "length" if len(self.asked) % 5 == 0 else "stop")


BOLD = replace(PRESETS["smoke"], scratch_learning_rate=0.1)  # enough for six steps to show


@pytest.fixture(scope="session")
def taught(run_sculpt: Callable[..., SculptResult], tmp_path_factory: pytest.TempPathFactory) -> SculptResult:
    spoiled = {3: " ", 7: "As an AI, I have no bridge.", 11: ""}
    return run_sculpt(tmp_path_factory.mktemp("taught"), answers="remote", teacher=Rewriter(spoiled.get), numbers=BOLD)


def test_a_remote_teachers_answers_are_learned_with_cross_entropy(taught: SculptResult, tiny_base: Base) -> None:
    examples = read_examples(taught.examples_path)
    assert all(one.answer_text.startswith("No rope") for one in examples)
    assert all((one.answer[-1] == tiny_base.tokenizer.eos_token_id) == one.ended for one in examples)
    assert {one.ended for one in examples} == {True, False}
    assert taught.settings["loss"] == "cross_entropy"
    assert (taught.settings["teacher"], taught.settings["teacher_model"]) == ("remote", "scribe-7b")


def test_a_remote_teachers_report_measures_its_likelihood(taught: SculptResult) -> None:
    report = taught.report
    assert (report["teacher"], report["teacher_model"], report["measure"]) == ("remote", "scribe-7b", "nll")
    for context in ("one_turn", "with_scene"):
        group = report[context]["all"]
        assert not any("kl" in name for name in group)
        rival = group["baseline_nll"][report["strongest_baseline"]]["mean"]
        assert group["gap_closed"]["mean"] == pytest.approx(1 - group["nll"]["mean"] / rival, abs=1e-3)
    history = report["learning"]
    assert history["baseline_nll"].keys() == {"wanda", "flap"}
    assert min(value for _, value in history["validation_nll"]) < history["validation_nll"][0][1]
    assert report["one_turn"]["all"]["nll"]["mean"] < report["one_turn"]["all"]["dense_nll"]["mean"]  # sic: it learned
    assert set(report["free_running"]["stop_rate"]) == {"teacher", "sculpted"}
    assert "dense_nll_of_teacher" in report["free_running"]


def test_recovery_after_a_remote_teacher_is_chosen_by_its_likelihood(
    run_sculpt: Callable[..., SculptResult], taught: SculptResult, tmp_path: Path
) -> None:
    spoiled = {3: " ", 7: "As an AI, I have no bridge.", 11: ""}
    recovered = run_sculpt(tmp_path, recovery="vectors", answers="remote", teacher=Rewriter(spoiled.get), numbers=BOLD)
    assert recovered.subnetwork.mask == taught.subnetwork.mask
    assert recovered.recovery == "vectors"
    before, after = (one.report["one_turn"]["all"]["nll"]["mean"] for one in (taught, recovered))
    assert after < before


def test_dropped_answers_are_counted_by_reason(taught: SculptResult) -> None:
    counts = taught.report["synthesis"]
    assert counts["dropped"] == {"empty": 2, "refusal": 1}
    assert counts["asked"] == counts["answered"] + 3
    assert 0 < counts["cut"] < counts["answered"]


def test_progress_tells_what_was_dropped(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    news: list[Progress] = []
    teacher = Rewriter(lambda number: " " if number in (3, 5) else None)
    run_sculpt(tmp_path, answers="remote", teacher=teacher, progress=news.append)
    told = [one.dropped for one in news if one.stage == "answer"]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 2)


def test_a_teacher_whose_answers_are_all_unusable_is_given_up_early(
    run_sculpt: Callable[..., SculptResult], tmp_path: Path
) -> None:
    teacher = Rewriter(lambda number: "Sure, here is the rewritten answer: no.")
    with pytest.raises(TeacherError, match=r"more than half .* 17 were dropped \(17 preamble\)"):
        run_sculpt(tmp_path, answers="remote", teacher=teacher)
    assert len(teacher.asked) == 17
    mended = Rewriter()
    run_sculpt(tmp_path, answers="remote", teacher=mended)  # what was dropped is asked anew
    assert set(teacher.asked) <= set(mended.asked)


def test_more_than_half_dropped_in_the_end_fails(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    teacher = Rewriter(lambda number: "" if number % 9 < 5 else None)
    with pytest.raises(TeacherError, match="more than half"):
        run_sculpt(tmp_path, answers="remote", teacher=teacher)


def test_a_resumed_job_asks_nothing_twice_of_what_it_saved(
    run_sculpt: Callable[..., SculptResult], tmp_path: Path
) -> None:
    spoiled = {2: "", 5: ""}
    first, second = Rewriter(spoiled.get), Rewriter()
    learning: list[str] = []
    with pytest.raises(SculptCancelled):
        run_sculpt(
            tmp_path,
            answers="remote",
            teacher=first,
            progress=lambda news: learning.append(news.stage),
            cancelled=lambda: learning.count("learn") >= 2,
        )
    result = run_sculpt(tmp_path, answers="remote", teacher=second)
    assert second.asked == []
    assert result.report["synthesis"]["dropped"] == {"empty": 2}


def test_another_teacher_starts_the_answers_anew(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    run_sculpt(tmp_path, answers="remote", teacher=Rewriter())
    other = Rewriter()
    other.digest = "6" * 64
    run_sculpt(tmp_path, answers="remote", teacher=other)
    assert other.asked


def test_a_remote_teacher_that_there_is_not_is_refused(run_sculpt: Callable[..., SculptResult], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="teacher_url") as refused:
        run_sculpt(tmp_path, answers="remote")
    assert refused.value.field == "teacher"


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
    assert "recover" not in none["plan"]["stage_bytes"]
    assert full["plan"]["stage_bytes"]["recover"] > vectors["plan"]["stage_bytes"]["recover"] > 0


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
