"""Variants are learned once, go on where they were, and see the examples that they name; on a tiny base."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ablations import REFERENCE, Persona, Run, Study, Variant, jaccard

from masquerade_engine import load_base
from masquerade_engine.base import Base
from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import Mask, SubNetwork
from masquerade_pruner import SculptResult
from masquerade_pruner.examples import Example, write_examples
from masquerade_pruner.importance import averaged_ranks
from masquerade_pruner.instructions import load_instructions
from masquerade_pruner.prior import Prior
from masquerade_pruner.sensitivity import question_prompt

STEPS = 6
PROMPTS = {"nettie": "You row.", "odo": "You sell hats."}


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32")


@pytest.fixture(scope="module")
def run(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(base, preset="smoke", steps=STEPS, cache_dir=tmp_path_factory.mktemp("cache"))


def _result(base: Base, folder: Path, persona: str) -> SculptResult:
    """What a sculpt would leave, with random answers and a random mask."""
    rng = random.Random(persona)
    system_prompt = persona_system_prompt(persona, PROMPTS[persona])
    questions = load_instructions()
    folder.mkdir(parents=True)
    for name, few in (
        ("train_plain", questions.train[:6]),
        ("validation", questions.validation[:2]),
        ("test", questions.test[:3]),
    ):
        examples = [
            Example(
                one.id, one.id, one.topic, one.split, one.text, "", 0.0,
                prompt=tuple(question_prompt(base, system_prompt, one.text)),
                answer=tuple(rng.randrange(256) for _ in range(5)),
                ended=False,
            )
            for one in few
        ]  # fmt: skip
        write_examples(folder / f"{name}.jsonl", examples)
    mask = torch.rand(3, 96, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 64
    subnetwork = SubNetwork(base.fingerprint, base.shape, Mask.from_dense(mask.numpy()))
    return SculptResult(subnetwork, "none", {}, system_prompt, "", {}, folder / "examples.jsonl", {})


@pytest.fixture
def persona(base: Base, run: Run, tmp_path: Path) -> Persona:
    return Persona(run, "nettie", _result(base, tmp_path / "answers", "nettie"), tmp_path / "cells")


def test_names_tell_what_differs() -> None:
    assert REFERENCE.name == "reference"
    assert Variant(loss="cross_entropy", data="any neutral").name == "loss cross_entropy, data any neutral"


INTERRUPTED = [
    REFERENCE,
    Variant(estimator="gumbel", temperature=0.1, seed=2),
    Variant(optimizer="adam", averaged=False),
]


@pytest.mark.parametrize("variant", INTERRUPTED)
def test_an_interrupted_variant_ends_as_an_uninterrupted_one(
    base: Base, run: Run, persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    whole = persona.learned(variant)
    other = Persona(run, "nettie", _result(base, tmp_path / "again", "nettie"), tmp_path / "other")
    validations = []

    def killed(mask: torch.Tensor) -> float:
        validations.append(mask)
        if len(validations) == 3:  # of the start, after three steps, and after six
            raise KeyboardInterrupt
        return Persona.validation_kl(other, mask)

    monkeypatch.setattr(other, "validation_kl", killed)
    with pytest.raises(KeyboardInterrupt):
        other.learned(variant)
    monkeypatch.undo()
    resumed = other.learned(variant)
    for name in ("mask", "scores"):
        assert torch.equal(resumed[name], whole[name])


def test_each_of_so_many_examples_is_learned_from_once(
    run: Run, persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the six examples there are; with two branches a step."""
    monkeypatch.setattr(run, "amounts", (1, 2, 4, 6))
    monkeypatch.setattr(run, "settings", replace(run.settings, branches_per_step=2))
    learned = []

    def learn(variant: Variant, start: Any, kept: int, batch: Callable[[int], list[Example]], *others: Any) -> Any:
        learned.append(
            (variant.num_examples, variant.steps, [one.id for step in range(variant.steps) for one in batch(step)])
        )
        return {"mask": persona.given.mask, "scores": start}

    monkeypatch.setattr(run, "learn", learn)
    table = Study(run, [persona], tmp_path).amount()
    ids = [one.id for one in persona.given.train]
    assert [(number, steps) for number, steps, _ in learned] == [(1, 1), (2, 1), (4, 2), (6, 3), (2, 2)]
    assert sorted(learned[2][2]) == sorted(ids[:4])
    assert sorted(learned[3][2]) == sorted(ids)
    assert sorted(learned[4][2]) == sorted(2 * ids[:2])
    assert any("num_examples 2, steps 2" in line for line in table)


def test_a_measured_variant_is_not_learned_again(
    base: Base, run: Run, persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = persona.test_kl(REFERENCE)
    assert found.shape == (3,)
    monkeypatch.setattr(run, "learn", None)
    again = Persona(run, "nettie", _result(base, tmp_path / "again", "nettie"), tmp_path / "cells")
    assert again.test_kl(REFERENCE).tolist() == found.tolist()


def test_the_usual_start_is_the_prior_where_there_is_one(
    run: Run, persona: Persona, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(persona.start(REFERENCE), persona.start(Variant(start="both")))
    scores = torch.rand(3, 96)
    monkeypatch.setattr(run, "prior", Prior({64: scores, 32: -scores}))
    ranks = averaged_ranks(scores)
    assert torch.equal(persona.start(REFERENCE), ranks)
    assert not torch.equal(persona.start(Variant(start="both")), ranks)
    assert not torch.equal(persona.start(Variant(start="wanda")), persona.start(Variant(start="fisher")))
    monkeypatch.setattr(run, "_start", "importance")
    assert torch.equal(persona.start(REFERENCE), persona.start(Variant(start="both")))
    assert torch.equal(persona.start(Variant(start="prior")), ranks)


def test_halves_share_no_question(persona: Persona) -> None:
    first, second = (
        {one.question_id for one in persona.examples(Variant(data=half))} for half in ("first half", "second half")
    )
    assert not first & second
    assert len(first | second) == 6


def test_voices_answer_the_same_number_of_questions(run: Run, persona: Persona, base: Base) -> None:
    found = {kind: persona.examples(Variant(data=kind)) for kind in ("selected", "any", "selected neutral")}
    selected, neutral = found["selected"], found["selected neutral"]
    assert [one.question_id for one in selected] == [one.question_id for one in persona.given.train]
    assert [one.prompt for one in neutral] == [one.prompt for one in selected]
    assert len(found["any"]) == len(selected)
    assert {one.question_id for one in found["any"]} != {one.question_id for one in selected}
    output = next(one.output for one in run.questions.train if one.id == neutral[0].question_id)
    limit = run.settings.answer_tokens
    assert neutral[0].answer == tuple(base.tokenizer.encode(output, add_special_tokens=False)[:limit])


def test_studies_of_two_personas(base: Base, run: Run, persona: Persona, tmp_path: Path) -> None:
    other = Persona(run, "odo", _result(base, tmp_path / "odo-answers", "odo"), tmp_path / "odo")
    study = Study(run, [persona, other], tmp_path / "pooled")
    loss = study.loss()
    mean = (persona.test_kl(REFERENCE).mean() + other.test_kl(REFERENCE).mean()) / 2
    assert loss[2] == f"| reference | {mean:.3f} |  |"
    assert len(loss) == 4
    whose = study.whose()
    swapped = persona.test_kl_of(other.learned(REFERENCE)["mask"]).mean()
    assert whose[2].startswith(f"| nettie | {persona.test_kl(REFERENCE).mean():.3f} | {swapped:.3f} |")
    assert [line.split(" | ")[0] for line in whose[2:]] == ["| nettie", "| odo", "| all"]
    assert study.similarity() == ["A correlation over pairs needs three personas."]


def test_the_pooled_mask_learns_from_all_in_turn(
    base: Base, run: Run, persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Persona(run, "odo", _result(base, tmp_path / "odo-answers", "odo"), tmp_path / "odo")
    batches: list[list[Example]] = []

    def learn(variant: Any, start: Any, kept: Any, batch: Any, *rest: Any) -> dict[str, torch.Tensor]:
        batches.extend(batch(step) for step in range(STEPS))
        return {"mask": torch.ones(3, 96)}

    monkeypatch.setattr(run, "learn", learn)
    Study(run, [persona, other], tmp_path / "pooled")._pooled()
    owners = [{one.prompt for one in person.given.train} for person in (persona, other)]
    assert all({one.prompt for one in batch} <= owners[step % 2] for step, batch in enumerate(batches))


def test_jaccard() -> None:
    one, other = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0]]), torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0]])
    assert jaccard(one, other) == pytest.approx((1 / 3 + 1) / 2)
