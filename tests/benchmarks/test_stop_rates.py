"""Rates of answers that end: the table's arithmetic, and a sub-network's answers on a tiny base, given once."""

from __future__ import annotations

from pathlib import Path

import pytest
import stop_rates
import torch
from stop_rates import Answers, measured, table

from masquerade_engine.base import load_base
from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import Mask, SubNetwork
from masquerade_pruner import SculptResult
from masquerade_pruner.examples import Example, write_examples
from masquerade_pruner.instructions import load_instructions


def _example(number: int, *, ended: bool) -> Example:
    one = load_instructions().test[number]
    tokens = (1, 2, 3, 4, 5) if ended else (7,) * 5  # of two runs of four tokens the second is the first again
    return Example(
        one.id, one.id, one.topic, one.split, one.text, "", 0.0, prompt=(1, 2), answer=tokens, ended=ended
    )  # fmt: skip


def _side(*ended: bool) -> list[Example]:
    return [_example(number, ended=one) for number, one in enumerate(ended)]


def test_rates_are_those_of_each_side_and_of_all_answers() -> None:
    lines = table(
        {
            "wyn": Answers(_side(True, False, False, False), _side(True, True, True, False)),
            "hob": Answers(_side(True, True), _side(False, False)),
        }
    )
    wyn, hob, everybody = (line.split(" | ") for line in lines[2:])
    assert wyn[:4] == ["| wyn", "4", "25.0%", "75.0%"]
    assert wyn[4].startswith("50.0% (")
    assert hob[2:5] == ["100.0%", "0.0%", "-100.0% (-100.0% to -100.0%)"]
    assert everybody[:4] == ["| all", "6", "50.0%", "50.0%"]
    assert wyn[5] == "37.5%"
    assert hob[5:] == ["0.0%", "50.0% |"]


def test_a_subnetwork_answers_every_test_question_once(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path / "cache", dtype="fp32")
    folder = tmp_path / "answers"
    folder.mkdir()
    dense = _side(True, False, True)
    for name in ("examples", "validation", "test"):
        write_examples(folder / f"{name}.jsonl", dense)
    mask = torch.rand(3, 96, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 64
    subnetwork = SubNetwork(base.fingerprint, base.shape, Mask.from_dense(mask.numpy()))
    prompt = persona_system_prompt("Wyn", "You row.")
    result = SculptResult(subnetwork, "none", {}, prompt, "", {}, folder / "examples.jsonl", {})
    answers = measured(base, result, tmp_path / "cell", 6)
    assert [one.question_id for one in answers.sculpted] == [one.question_id for one in dense]
    assert answers.dense == dense
    assert all(0 < len(one.answer) <= 6 for one in answers.sculpted)
    monkeypatch.setattr(stop_rates, "Engine", None)
    assert measured(base, result, tmp_path / "cell", 6) == answers
