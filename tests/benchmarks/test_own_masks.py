"""Own masks beside others' and the prior's: the table's arithmetic, and a run on a tiny base that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import own_masks
import pytest
import torch
from own_masks import PRIOR, Cast, measured, table

from masquerade_engine.base import load_base
from masquerade_masks import round_kept
from masquerade_pruner import PRESETS, SculptSpec
from masquerade_pruner.examples import read_examples
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.prior import Prior, prior_path, write_prior
from masquerade_pruner.tree import masked


def test_own_is_compared_question_by_question_with_the_mean_of_the_others() -> None:
    masks = {
        name: torch.tensor([[float(one == "x") for one in drawn]])
        for name, drawn in {"wyn": "xx..", "hob": "xx..", "tib": ".xx.", PRIOR: "x..x"}.items()
    }
    means = {
        "wyn": {"wyn": 0.5, "hob": 1.0, "tib": 1.5, PRIOR: 0.5},
        "hob": {"wyn": 2.0, "hob": 1.0, "tib": 2.0, PRIOR: 4.0},
        "tib": {"wyn": 1.0, "hob": 1.0, "tib": 1.0, PRIOR: 2.0},
    }
    kl = {(name, whose): np.array([0.5, 1.5]) * one for name, row in means.items() for whose, one in row.items()}
    lines = table(Cast(0.5, masks, kl))
    assert "| wyn | 0.5000 | 1.2500 | 1.0000 | 60.0% (60.0% to 60.0%) | 0.5000 | 0.0% (0.0% to 0.0%) |" in lines
    assert "| hob | 1.0000 | 2.0000 | 2.0000 | 50.0% (50.0% to 50.0%) | 4.0000 | 75.0% (75.0% to 75.0%) |" in lines
    assert lines[-4].startswith("| mean | 0.8333 | 1.4167 | 1.3333 | 36.7%")
    assert "masks 0.556, of one with the prior's 0.222; the 3 keep 0.750 of all" in lines[-2]
    without = Cast(0.5, {name: mask for name, mask in masks.items() if name != PRIOR}, kl)
    assert "| wyn | 0.5000 | 1.2500 | 1.0000 | 60.0% (60.0% to 60.0%) |" in table(without)


def test_every_mask_meets_every_personas_questions_once(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path / "cache", dtype="fp32")
    rows = [
        {"instruction": f"{word} {topic}?", "input": "", "output": "Yes.", "topic": topic}
        for topic in (f"topic{index}" for index in range(24))
        for word in ("alpha", "brick")
    ]
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(rows), "utf-8")
    numbers = replace(
        PRESETS["smoke"],
        steps=8,
        learning_rate=0.5,
        answer_tokens=6,
        num_validation=4,
        num_test=4,
        num_free_running=0,
        num_test_scenes=0,
    )
    people = [("wyn", "Wyn", "You row a ferry."), ("hob", "Hob", "You grind corn and SHOUT.")]
    specs = [SculptSpec(*one, sparsity=0.5, numbers=numbers, instructions=questions) for one in people]
    kept = round_kept(base.shape.intermediate_size, 0.5)
    scores = torch.rand(
        (base.shape.num_layers, base.shape.intermediate_size), generator=torch.Generator().manual_seed(0)
    )
    (tmp_path / "cache" / "priors").mkdir(parents=True)
    write_prior(prior_path(base, tmp_path / "cache"), base, Prior({kept: scores}), "{}")
    cast = measured(base, specs, tmp_path)
    assert list(cast.masks) == ["wyn", "hob", PRIOR]
    assert not cast.masks["wyn"].equal(cast.masks["hob"])
    assert set(cast.kl) == {(name, whose) for name in ("wyn", "hob") for whose in cast.masks}
    model = base.build_model()
    test = read_examples(tmp_path / "hob-answers" / "test.jsonl")
    wanted = HeldOut(model, test).divergence(masked(model, cast.masks["wyn"])).kl
    assert cast.kl["hob", "wyn"].tolist() == pytest.approx(wanted.tolist())

    monkeypatch.setattr(own_masks, "HeldOut", None)
    again = measured(base, specs, tmp_path)
    assert table(again) == table(cast)
