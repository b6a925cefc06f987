"""The base's states that come with its answers: what they are, when they are used, and how they are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masquerade_engine.base import Base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_masks import SubNetwork
from masquerade_pruner.examples import Example, read_examples
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.mask_learning import dense_states, plant_examples
from masquerade_pruner.teacher import Ask, SelfTeacher
from masquerade_pruner.tree import masked
from masquerade_pruner.workdir import Workdir

MakeExamples = Callable[..., list[Example]]


@pytest.fixture
def engine(tiny_base: Base) -> Iterator[Engine]:
    with Engine(tiny_base, EngineSettings(max_num_seqs=3, max_model_len=128)) as made:
        yield made


def answered(engine: Engine, questions: Sequence[Example], subnetwork: SubNetwork | None = None) -> list[Example]:
    """The questions with the answers, and states, that the engine gives."""
    digest = "base" if subnetwork is None else subnetwork.digest
    teacher = SelfTeacher(engine, PersonaFunction(digest, "town", subnetwork))
    asks = [Ask(one.id, one.prompt, "", "", seed=number) for number, one in enumerate(questions)]
    given = {one.ask_id: one for one in teacher.answer(asks, max_tokens=9)}
    return [replace(one, answer=given[one.id].tokens, dense_states=given[one.id].dense_states) for one in questions]


def forgotten(examples: Sequence[Example]) -> list[Example]:
    return [replace(one, dense_states=None) for one in examples]


def test_they_are_what_the_learner_would_compute(
    engine: Engine, tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = answered(engine, make_examples(7))
    known, unknown = (plant_examples(some, tiny_model) for some in (examples, forgotten(examples)))
    assert known.dense_states is not None
    assert unknown.dense_states is None
    assert dense_states(tiny_model, known) is known.dense_states
    torch.testing.assert_close(known.dense_states, dense_states(tiny_model, unknown), atol=1e-4, rtol=1e-4)
    mask = (torch.rand(3, 96, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    found, wanted = (
        HeldOut(tiny_model, some).divergence(masked(tiny_model, mask)).kl for some in (examples, forgotten(examples))
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_a_subnetworks_answers_bring_none(
    engine: Engine, tiny_base: Base, make_subnetwork: Callable[..., SubNetwork], make_examples: MakeExamples
) -> None:
    examples = answered(engine, make_examples(2), make_subnetwork(tiny_base))
    assert all(one.answer and one.dense_states is None for one in examples)


def test_they_are_used_where_all_are_known_and_only_answers_are_supervised(
    engine: Engine, tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = answered(engine, make_examples(3))
    assert plant_examples([*forgotten(examples[:1]), *examples[1:]], tiny_model).dense_states is None
    assert plant_examples(examples, tiny_model, question_share=0.2).dense_states is None
    with pytest.raises(AssertionError, match="a state before each answer token"):
        plant_examples([replace(examples[0], answer=(1, *examples[0].answer)), *examples[1:]], tiny_model)


def test_a_directory_keeps_them_and_writes_each_once(tmp_path: Path, make_examples: MakeExamples) -> None:
    examples = [replace(one, dense_states=torch.randn(len(one.answer), 8)) for one in make_examples(6)]
    workdir = Workdir(tmp_path, {"persona": "witch"})
    for count in (2, 2, 5):
        workdir.write_examples("train", examples[:count])
    assert {one.name for one in tmp_path.glob("*.safetensors")} == {
        "train-states-0.safetensors",
        "train-states-1.safetensors",
    }
    found = Workdir(tmp_path, {"persona": "witch"}).read_examples("train")
    assert found == examples[:5]
    for one, other in zip(found, examples, strict=False):
        assert one.dense_states is not None
        assert torch.equal(one.dense_states, other.dense_states)
    assert all(one.dense_states is None for one in read_examples(workdir.examples_path("train")))
    assert Workdir(tmp_path, {"persona": "smith"}).read_examples("train") == []
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_example_whose_states_were_not_written_yet_has_none(tmp_path: Path, make_examples: MakeExamples) -> None:
    examples = [replace(one, dense_states=torch.randn(len(one.answer), 8)) for one in make_examples(4)]
    workdir = Workdir(tmp_path, {})
    workdir.write_examples("train", examples[:2])
    workdir.write_examples("train", [*examples[:2], *forgotten(examples[2:])])  # killed before the states
    assert [one.dense_states is not None for one in workdir.read_examples("train")] == [True, True, False, False]
