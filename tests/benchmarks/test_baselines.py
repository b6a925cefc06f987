"""The comparison's cells and tables, on a tiny base."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import pytest
import torch
from baselines import OURS, Case, Comparison, Figures, _steps_of_kind, tables
from sculpts import Material

from masquerade_engine import load_base
from masquerade_pruner.examples import Example
from masquerade_pruner.recovery import RecoverySettings

METHODS = ["random", "wanda", "depth-ffns"]


def _example(number: int, split: Any) -> Example:
    rng = random.Random(number)
    tokens = [rng.randrange(256) for _ in range(12)]
    prompt = (*range(40, 60), *tokens[:6])
    return Example(str(number), str(number), "any", split, "", "", None, prompt, tuple(tokens[6:]), False)


@pytest.fixture(scope="module")
def model(tiny_base_dir: Path) -> torch.nn.Module:
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32").build_model()


def _given(split_size: int = 4) -> Material:
    mask = torch.zeros(3, 96)
    mask[:, :64] = 1
    numbers = iter(range(100))
    held_out = {split: [_example(next(numbers), split) for _ in range(split_size)] for split in ("validation", "test")}
    return Material([_example(next(numbers), "train") for _ in range(6)], **held_out, mask=mask)


def _comparison(model: Any, folder: Path, given: Material, base: str = "one") -> Comparison:
    return Comparison(lambda: model, given, folder, identity={"base": base}, num_calibration=4, num_seeds=2)


def _refuse() -> torch.nn.Module:
    raise AssertionError("a kept cell needs no model")


def test_an_interrupted_run_goes_on_where_it_was(model: torch.nn.Module, tmp_path: Path) -> None:
    first = _comparison(model, tmp_path, _given())
    found = {method: first.figures(method, "none") for method in (OURS, *METHODS)}
    again = Comparison(_refuse, _given(), tmp_path, identity={"base": "one"}, num_calibration=4, num_seeds=2)
    assert {method: again.figures(method, "none") for method in (OURS, *METHODS)} == found
    with pytest.raises(AssertionError, match="needs no model"):
        again.figures("flap", "none")


def test_figures_of_another_base_or_of_other_examples_are_not_taken(model: torch.nn.Module, tmp_path: Path) -> None:
    for other in ({"base": "other"}, {"given": _given(split_size=3)}):
        _comparison(model, tmp_path, _given()).figures("wanda", "none")
        assert (tmp_path / "none" / "wanda-0.json").is_file()
        _comparison(model, tmp_path, **({"given": _given()} | other)).figures("random", "none")
        assert not (tmp_path / "none" / "wanda-0.json").exists()


def test_another_learned_mask_is_measured_and_the_other_methods_are_kept(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    given = _given()
    before = {method: _comparison(model, tmp_path, given).figures(method, "none") for method in (OURS, "random")}
    again = _comparison(model, tmp_path, replace(given, mask=given.mask.flip(1)))
    assert again.figures("random", "none") == before["random"]
    found = again.figures(OURS, "none")
    assert found is not None
    assert before[OURS] is not None
    assert found.test != before[OURS].test


def test_random_masks_are_averaged_by_question(model: torch.nn.Module, tmp_path: Path) -> None:
    comparison = _comparison(model, tmp_path, _given())
    both = comparison.figures("random", "none")
    one, other = (comparison._cell("random", seed, "none") for seed in (0, 1))
    assert both is not None
    assert both.test == pytest.approx([(a + b) / 2 for a, b in zip(one.test, other.test, strict=True)])
    assert one.test != other.test


def test_what_is_no_mask_is_not_recovered(model: torch.nn.Module, tmp_path: Path) -> None:
    comparison = _comparison(model, tmp_path, _given())
    assert comparison.figures("slicegpt", "vectors") is None
    assert comparison.figures("flap-bias", "full") is None


def test_a_mask_is_built_once_for_all_its_recoveries(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, seen = baselines.METHODS["wanda"], []
    monkeypatch.setitem(baselines.METHODS, "wanda", lambda setting: seen.append(setting) or build(setting))
    comparison = _comparison(model, tmp_path, _given())
    for recovery in ("vectors", "full"):
        assert comparison.figures("wanda", recovery) is not None
    assert len(seen) == 1


def test_each_kind_of_recovery_has_a_budget_of_its_own(model: torch.nn.Module, tmp_path: Path) -> None:
    for steps in (1, 2):
        comparison = Comparison(
            lambda: model,
            _given(),
            tmp_path,
            identity={"base": "one"},
            num_calibration=4,
            recovery_steps={"vectors": steps},
        )
        assert comparison.figures("wanda", "vectors") is not None
    assert {path.parent.name for path in tmp_path.glob("*/wanda-0.json")} == {"none", "vectors-1", "vectors-2"}
    assert comparison._settings("full").steps == RecoverySettings().steps


@pytest.mark.parametrize("text", ["vectors", "none=3", "lora=0", "lora=-1", "full=many", "=4"])
def test_a_wrong_budget_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not one of vectors, lora, full"):
        _steps_of_kind(text)
    assert _steps_of_kind("full=12") == ("full", 12)


class _Fixed:
    """Figures given beforehand, in a comparison's place."""

    def __init__(self, validation: dict[str, float], test: dict[str, float]) -> None:
        self._validation, self._test = validation, test

    def figures(self, method: str, recovery: str) -> Figures | None:
        if recovery != "none" and method == "slicegpt":
            return None
        scale = 1.0 if recovery == "none" else 0.5
        values = (self._validation.get(method, 0.1), self._test[method])
        return Figures(*([scale * value] * 3 for value in values), num_dropped=2_500_000, seconds=1.0)


def test_the_strongest_is_chosen_on_validation_and_read_on_test() -> None:
    fixed: Any = _Fixed({"wanda": 0.5, "slicegpt": 0.4}, {OURS: 0.3, "wanda": 0.4, "slicegpt": 0.6})
    lines = tables([Case("nettie", 0.25, fixed)], ["wanda", "slicegpt"], ["none", "vectors"])
    assert "| slicegpt | 2.50 | 0.600 | 50.0% (50.0% to 50.0%) | – | – |" in lines
    assert "| nettie | 25% | none | none | slicegpt | 0.300 | 0.600 | 50.0% (50.0% to 50.0%) |" in lines
    assert "| nettie | 25% | vectors | vectors | wanda | 0.150 | 0.200 | 25.0% (25.0% to 25.0%) |" in lines
    assert "| nettie | 25% | vectors | none | slicegpt | 0.150 | 0.600 | 75.0% (75.0% to 75.0%) |" in lines
    assert "| 25% | none | none | 1 | 0.300 | 0.600 | 50.0% (50.0% to 50.0%) |" in lines


def test_ours_alone_may_be_recovered() -> None:
    fixed: Any = _Fixed({"slicegpt": 0.4}, {OURS: 0.3, "slicegpt": 0.6})
    lines = tables([Case("nettie", 0.25, fixed)], ["slicegpt"], ["none", "vectors"])
    assert "| 25% | vectors | none | 1 | 0.150 | 0.600 | 75.0% (75.0% to 75.0%) |" in lines
    assert not any("| vectors | vectors |" in line for line in lines)
