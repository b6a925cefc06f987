"""A whole appraisal on a tiny base with few questions: its parts, its contexts kept apart, its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reference_scores import random_subnetwork

from masquerade_engine.base import Base, load_base
from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_masks import BaseMismatch, SettingError, SubNetwork
from masquerade_pruner import appraisal, sensitivity
from masquerade_pruner.appraisal import QUICK, Appraisal, AppraisalSettings, Subject, appraise
from masquerade_pruner.instructions import InstructionSet, load_instructions
from masquerade_pruner.question_files import FileQuestion, QuestionFile

FEW = replace(
    QUICK,
    answer_tokens=12,
    num_test=8,
    num_test_scenes=4,
    num_free_running=3,
    num_validation=3,
    num_importance=4,
    num_discrimination=4,
    candidate_tokens=8,
    num_file_answers=3,
    num_choices=8,
    turns=2,
)
QUESTIONS = QuestionFile(
    "file.json",
    (FileQuestion("Who is it?", ("It is me.",)), FileQuestion("Where is it?")),
    scenes=("You are very proud.", "You boast."),
    eval_prompt="{question} {answer}",
)


@pytest.fixture(scope="module", autouse=True)
def few_questions() -> object:
    every, references = load_instructions(), sensitivity.load_references()
    few = InstructionSet(every.train[::60], every.validation[::12], every.test[::12])
    short = [replace(one, text=one.text[:60]) for one in references[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appraisal, "load_instructions", lambda path=None: few)
        patch.setattr(appraisal, "load_references", lambda: short)
        patch.setattr(sensitivity, "load_references", lambda: short)
        yield


@pytest.fixture(scope="module")
def roomy_base(make_tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A byte a token takes room."""
    directory = make_tiny_base(tmp_path_factory.mktemp("roomy") / "base", max_position_embeddings=2048)
    return load_base(str(directory), cache_dir=directory.parent, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def run(roomy_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Appraisal]:
    cache_dir = tmp_path_factory.mktemp("appraisal-cache")

    def appraised(settings: AppraisalSettings = FEW, **keywords: object) -> Appraisal:
        return appraise(subject(roomy_base), roomy_base, settings, cache_dir=cache_dir, **keywords)

    return appraised


def subject(base: Base, *, others: bool = True) -> Subject:
    prompt = persona_system_prompt("Tester", "You test bridges.")
    ours = random_subnetwork(base, recovered=True)
    other = SubNetwork(ours.base, ours.shape, random_subnetwork(base, recovered=False).mask)
    return Subject(
        "tester", "Tester", 2, prompt, ours, "vectors", prompt_sha256(prompt), others={"other": other} if others else {}
    )


@pytest.fixture(scope="module")
def whole(run: Callable[..., Appraisal]) -> Appraisal:
    return run(questions=QUESTIONS)


def test_every_part_is_there_and_contexts_are_kept_apart(whole: Appraisal) -> None:
    report = whole.report
    json.dumps(report, allow_nan=False)
    assert report["format"] == "masquerade.eval/1"
    assert (report["persona"], report["version"], report["recovery"]) == ("tester", 2, "vectors")
    assert report["learned_under_this_prompt"] is True
    assert set(report["seconds"]) == set(appraisal.PARTS)
    assert report["one_turn"]["all"]["num_questions"] == 8
    assert report["with_scene"]["all"]["num_questions"] == 4
    for context in ("one_turn", "with_scene"):
        figures = report[context]["all"]
        assert figures["kl"]["mean"] > 0
        assert set(figures["baseline_kl"]) == {"wanda", "flap"}
        assert report[context]["free_running"]["num_questions"] == 3
    assert report["strongest_baseline"] in ("wanda", "flap")
    conversations = report["conversations"]
    assert [turn["turn"] for turn in conversations["turns"]] == [1, 2]
    assert conversations["kl"]["mean"] == pytest.approx(
        sum(turn["kl"]["mean"] for turn in conversations["turns"]) / 2, abs=2e-4
    )
    asked = report["questions"]
    assert (asked["one_turn"]["num_questions"], asked["with_scene"]["num_questions"]) == (2, 3)
    assert asked["references"]["num_answers"] == 1
    found = report["discrimination"]
    assert found["swapped_mask_of"] == "other"
    assert {"sculpted", "dense_with_prompt", "dense_without_prompt", "swapped_mask"} <= set(found)
    for context in ("plain", "in_persona"):
        assert report["capability"][context]["num_questions"] == 8


def test_every_answer_of_both_models_is_kept(whole: Appraisal) -> None:
    by_part: dict[str, set[tuple[str, str]]] = {}
    for one in whole.spoken:
        by_part.setdefault(one.part, set()).add((one.id, one.model))
    assert set(by_part) == {"one_turn", "with_scene", "questions/one_turn", "questions/with_scene", "conversations"}
    for pairs in by_part.values():
        assert {(name, "dense") for name, _ in pairs} | {(name, "sculpted") for name, _ in pairs} == pairs
    second = next(one for one in whole.spoken if one.id.endswith("/turn-2"))
    assert len(second.history) == 2
    assert {one.scene for one in whole.spoken if one.part == "questions/with_scene"} <= set(QUESTIONS.scenes)


def test_the_same_seed_gives_the_same_report(whole: Appraisal, run: Callable[..., Appraisal]) -> None:
    again = run(replace(FEW, parts=("test", "discrimination")), questions=QUESTIONS).report
    for part in ("one_turn", "with_scene", "discrimination"):
        assert again[part] == whole.report[part]
    other = run(replace(FEW, parts=("test",), seed=1)).report
    assert other["one_turn"] != whole.report["one_turn"]


def test_parts_alone(run: Callable[..., Appraisal]) -> None:
    news: list[tuple[str, int, int]] = []
    report = run(replace(FEW, parts=("capability",)), on_progress=lambda *one: news.append(one)).report
    assert "capability" in report
    assert not {"one_turn", "discrimination", "conversations", "questions"} & set(report)
    assert all(0 <= done <= total for _, done, total in news)
    assert any("in_persona" in what for what, _, _ in news)
    with pytest.raises(SettingError, match="parts"):
        replace(FEW, parts=("parts",))


def test_a_full_mask_has_lost_nothing(roomy_base: Base, tmp_path: Path) -> None:
    ours = random_subnetwork(roomy_base, recovered=False)
    whole_mask = type(ours.mask).from_dense(ours.mask.to_dense() | True)
    full = replace(subject(roomy_base, others=False), subnetwork=SubNetwork(ours.base, ours.shape, whole_mask))
    parts = ("capability", "conversations", "discrimination")
    report = appraise(full, roomy_base, replace(FEW, parts=parts), cache_dir=tmp_path).report
    assert report["capability"]["plain"]["drop"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert report["conversations"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    assert report["discrimination"]["sculpted"] == report["discrimination"]["dense_with_prompt"]
    assert report["discrimination"]["swapped_mask_of"] is None
    assert "swapped_mask" not in report["discrimination"]


def test_another_base_is_refused(roomy_base: Base, tmp_path: Path) -> None:
    ours = random_subnetwork(roomy_base, recovered=False)
    other = replace(subject(roomy_base), subnetwork=SubNetwork("0" * 64, ours.shape, ours.mask))
    with pytest.raises(BaseMismatch):
        appraise(other, roomy_base, FEW, cache_dir=tmp_path)
