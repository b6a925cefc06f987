"""A prior: learned from all references, resumable, and where sculpts start."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from masquerade_engine.base import Base
from masquerade_masks import MaskFormatError, SculptCancelled, SettingError, round_kept
from masquerade_pruner.changes import Change
from masquerade_pruner.importance import averaged_ranks
from masquerade_pruner.instructions import Instruction, InstructionSet, Split
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.prior import Prior, prior_of, prior_path
from masquerade_pruner.prior_learning import PriorSettings, learn_prior
from masquerade_pruner.progress import Progress
from masquerade_pruner.recovery import Recovery
from masquerade_pruner.sensitivity import Reference

SMALL = PriorSettings(
    sparsities=(0.25, 0.5),
    steps=13,
    branches_per_step=3,
    answer_tokens=5,
    num_importance=2,
    num_validation=2,
    num_validation_personas=1,
    validate_every=4,
)
INSTRUCTIONS = InstructionSet(
    *(
        tuple(Instruction(f"{split}{index}", "any", f"Is {index} odd?", "No.", split) for index in range(6))
        for split in get_args(Split)
    )
)
REFERENCES = [Reference(name, name.title(), f"You are {name}.") for name in ("ada", "bob", "cyd")]


def learn(base: Base, workdir: Path, out: Path, **keywords: Any) -> Prior:
    return learn_prior(base, workdir, out, SMALL, instructions=INSTRUCTIONS, references=REFERENCES, **keywords)


def test_scores_are_learned_for_every_sparsity_and_found_again(tiny_base: Base, tmp_path: Path) -> None:
    news: list[Progress] = []
    out = prior_path(tiny_base, tmp_path)
    learned = learn(tiny_base, tmp_path / "work", out, progress=news.append)
    shape, found = tiny_base.shape, prior_of(tiny_base, tmp_path)
    assert found is not None
    kept = [round_kept(shape.intermediate_size, sparsity) for sparsity in SMALL.sparsities]
    assert sorted(found.scores) == sorted(kept)
    for number in kept:
        assert found.at(number).shape == (shape.num_layers, shape.intermediate_size)
        assert torch.equal(found.at(number), learned.at(number))
    assert not torch.equal(found.at(kept[0]), found.at(kept[1]))
    assert list(dict.fromkeys(one.stage for one in news)) == ["answer", *(f"learn, {number} kept" for number in kept)]
    assert any(one.loss is not None for one in news)


def test_an_interrupted_prior_goes_on_to_the_same_scores(tiny_base: Base, tmp_path: Path) -> None:
    whole = learn(tiny_base, tmp_path / "whole", tmp_path / "whole.safetensors")
    steps: list[int] = []
    for stop_after in (11, 13 + 4):  # in the middle of either sparsity
        with pytest.raises(SculptCancelled):
            learn(
                tiny_base,
                tmp_path / "halved",
                tmp_path / "halved.safetensors",
                progress=lambda at: steps.append(at.completed) if at.loss is not None else None,
                cancelled=lambda limit=stop_after: len(steps) >= limit,  # type: ignore[misc]
            )
    halved = learn(tiny_base, tmp_path / "halved", tmp_path / "halved.safetensors")
    for kept, scores in whole.scores.items():
        assert torch.equal(halved.scores[kept], scores)


def test_another_round_starts_from_the_prior_there_is_and_asks_anew(tiny_base: Base, tmp_path: Path) -> None:
    first = learn(tiny_base, tmp_path / "first", tmp_path / "first.safetensors")
    fewer = replace(SMALL, sparsities=(0.25,))
    path = tmp_path / "second.safetensors"
    second = learn_prior(
        tiny_base, tmp_path / "second", path, fewer, start=first, instructions=INSTRUCTIONS, references=REFERENCES
    )
    many, few = (round_kept(tiny_base.shape.intermediate_size, one) for one in SMALL.sparsities)
    assert (first.rounds, second.rounds) == (1, 2)
    assert torch.equal(second.at(few), first.at(few))
    history = json.loads((tmp_path / "second" / "scores" / f"kept-{many}.json").read_text())
    again = json.loads((tmp_path / "first" / "scores" / f"kept-{many}.json").read_text())
    assert history["kl"][0][1] == pytest.approx(min(kl for _, kl in again["kl"]), rel=1e-4)
    assert second.digest(few) == first.digest(few)
    assert second.digest(many) != first.digest(many)
    answers = [(tmp_path / name / "answers" / "ada.jsonl").read_text() for name in ("first", "second")]
    assert answers[0] != answers[1]


def test_a_blended_round_starts_on_the_way_to_the_sparser_scores(tiny_base: Base, tmp_path: Path) -> None:
    many, few = (round_kept(tiny_base.shape.intermediate_size, one) for one in SMALL.sparsities)
    first = Prior({kept: torch.randn(3, 96, generator=torch.Generator().manual_seed(kept)) for kept in (many, few)})
    # At no learning rate, what a round ends with is what it started from.
    still = replace(SMALL, blend=0.4, learning_rate=0.0)
    given = {"instructions": INSTRUCTIONS, "references": REFERENCES, "start": first}
    second = learn_prior(tiny_base, tmp_path / "second", tmp_path / "second.safetensors", still, **given)  # type: ignore[arg-type]
    ranks = {kept: averaged_ranks(first.at(kept)) for kept in (many, few)}
    assert torch.equal(second.at(few), ranks[few])
    assert torch.equal(second.at(many), averaged_ranks(torch.lerp(ranks[many], ranks[few], 0.4)))
    assert not torch.equal(second.at(many), ranks[many])


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
def test_a_blend_out_of_range_is_refused(blend: float) -> None:
    with pytest.raises(SettingError, match="blend"):
        replace(SMALL, blend=blend)


def test_the_nearest_number_of_kept_neurons_is_taken() -> None:
    few, many = torch.zeros(1, 8), torch.ones(1, 8)
    prior = Prior({768: few, 1152: many})
    assert prior.at(96) is prior.at(768) is prior.at(960) is few
    assert prior.at(992) is prior.at(1500) is many


def test_without_a_prior_there_is_none(tiny_base: Base, tmp_path: Path) -> None:
    assert prior_of(tiny_base, tmp_path) is None


@pytest.mark.parametrize(
    ("metadata", "scores", "reason"),
    [
        ({"base": "another"}, None, "not a prior of this base"),
        ({"format": "masquerade.prior/9"}, None, "not a prior of this base"),
        ({}, torch.zeros(2, 8), "finite scores of shape"),
        ({}, torch.full((3, 96), float("nan")), "finite scores of shape"),
    ],
)
def test_an_unusable_prior_is_refused(
    tiny_base: Base, tmp_path: Path, metadata: dict[str, str], scores: torch.Tensor | None, reason: str
) -> None:
    shape, path = tiny_base.shape, prior_path(tiny_base, tmp_path)
    assert (shape.num_layers, shape.intermediate_size) == (3, 96)
    path.parent.mkdir()
    good = {"format": "masquerade.prior/1", "base": tiny_base.fingerprint}
    save_file({"64": torch.zeros(3, 96) if scores is None else scores}, path, good | metadata)
    with pytest.raises(MaskFormatError, match=reason):
        prior_of(tiny_base, tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kept", torch.arange(64).flip(0).repeat(3, 1)),
        ("kept", torch.arange(64).repeat(2, 1)),
        ("kept", torch.arange(60, 124).repeat(3, 1)),
        ("kept", None),
        ("gain", torch.ones(3, 63)),
        ("gain", torch.tensor(1.0)),
        ("down_proj.lora_A", torch.ones(3, 64)),
        ("gain", torch.full((3, 64), float("nan"))),
    ],
)
def test_an_unusable_recovery_is_refused(
    tiny_base: Base, tmp_path: Path, name: str, wrong: torch.Tensor | None
) -> None:
    path = prior_path(tiny_base, tmp_path)
    path.parent.mkdir()
    recovery = {"kept": torch.arange(64).repeat(3, 1), "gain": torch.ones(3, 64), "bias": torch.zeros(3, 32)}
    metadata = {"format": "masquerade.prior/1", "base": tiny_base.fingerprint}
    for tensors, reason in ((recovery, None), (recovery | {name: wrong}, "a vectors recovery that is not of 64")):
        named = {f"64/vectors/{key}": one for key, one in tensors.items() if one is not None}
        save_file({"64": torch.zeros(3, 96), **named}, path, metadata)
        with nullcontext() if reason is None else pytest.raises(MaskFormatError, match=reason):
            found = prior_of(tiny_base, tmp_path)
            assert found is not None
            assert found.recovery("vectors", torch.arange(64).repeat(3, 1)) is not None


@pytest.mark.parametrize("sparsities", [(), (0.0,), (0.5, 1.0), (float("nan"),)])
def test_sparsities_out_of_range_are_refused(sparsities: tuple[float, ...]) -> None:
    with pytest.raises(SettingError, match="sparsity"):
        replace(SMALL, sparsities=sparsities)


@pytest.fixture(scope="module")
def first(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Prior:
    folder = tmp_path_factory.mktemp("first")
    return learn(tiny_base, folder, folder / "prior.safetensors")


@pytest.mark.parametrize("kind", ["vectors", "lora"])
def test_a_recovery_is_learned_on_top_of_the_priors_masks(
    tiny_base: Base, tmp_path: Path, first: Prior, kind: Recovery
) -> None:
    news: list[Progress] = []
    recovered = learn_recovery(tiny_base, tmp_path / "prior.safetensors", kind, first, progress=news.append)
    assert recovered.rounds == first.rounds
    assert {one.message for one in news if one.loss is not None} == {f"recovering with {kind}"}
    for kept, scores in first.scores.items():
        assert torch.equal(recovered.scores[kept], scores)
        shared = recovered.recoveries[kept, kind]
        assert torch.equal(shared.kept, Change.of_mask(tiny_base.build_model(), top_k_mask(scores, kept)).kept)
        start = recovered.recovery(kind, shared.kept)
        assert start is not None
        assert all(torch.equal(start[name], one) for name, one in shared.tensors.items())
        assert recovered.digest(kept) == first.digest(kept)
        assert recovered.digest(kept, kind) != first.digest(kept, kind)
        assert (recovered.digest(kept, "full") == recovered.digest(kept)) == (kind == "vectors")
    again = learn_recovery(tiny_base, tmp_path / "again.safetensors", kind, recovered)
    assert all(again.digest(kept, kind) != recovered.digest(kept, kind) for kept in first.scores)


def test_an_interrupted_recovery_goes_on_to_the_same_tensors(tiny_base: Base, tmp_path: Path, first: Prior) -> None:
    whole = learn_recovery(tiny_base, tmp_path / "whole.safetensors", "lora", first)
    steps: list[int] = []
    with pytest.raises(SculptCancelled):
        learn_recovery(
            tiny_base,
            tmp_path / "halved.safetensors",
            "lora",
            first,
            progress=lambda at: steps.append(at.completed) if at.loss is not None else None,
            cancelled=lambda: len(steps) >= 13 + 10,
        )
    halved = learn_recovery(tiny_base, tmp_path / "halved.safetensors", "lora", first)
    assert all(halved.digest(kept, "lora") == whole.digest(kept, "lora") for kept in first.scores)


def learn_recovery(base: Base, out: Path, kind: Recovery, start: Prior, **keywords: Any) -> Prior:
    settings = replace(SMALL, recovery=kind, validate_every=1)
    given = {"instructions": INSTRUCTIONS, "references": REFERENCES, "start": start}
    return learn_prior(base, out.with_suffix(".work"), out, settings, **given, **keywords)  # type: ignore[arg-type]


def test_a_recovery_needs_a_prior_and_is_no_personas_own_weights(tiny_base: Base, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a prior that there is"):
        learn_prior(tiny_base, tmp_path, tmp_path / "prior.safetensors", replace(SMALL, recovery="lora"))
    with pytest.raises(SettingError, match="'full' is not one of none, vectors, lora"):
        replace(SMALL, recovery="full")


def test_of_another_kind_there_is_no_recovery(first: Prior) -> None:
    assert first.recovery("lora", torch.zeros(3, 64, dtype=torch.long)) is None
