from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from masquerade_engine.base import Base
from masquerade_engine.context import forward_context
from masquerade_engine.reference import ReferenceContext
from masquerade_pruner.instructions import Instruction, InstructionSet
from masquerade_pruner.sensitivity import (
    load_references,
    persona_units,
    question_prompt,
    reference_pass,
    select,
)


def _question(index: int, topic: str = "t") -> Instruction:
    return Instruction(f"{topic}-{index}", topic, f"What about {topic} number {index}?", "", "train")


def test_sensitivity_is_the_papers_formula(tiny_base: Base, tiny_model: torch.nn.Module, tmp_path: Path) -> None:
    """The stored mean of unit vectors gives the mean cosine distance over blocks and references."""
    questions = InstructionSet((_question(0), _question(1)), (_question(2),), (_question(3),))
    found = reference_pass(tiny_base, lambda: tiny_model, questions, tmp_path)
    units = persona_units(tiny_base, tiny_model, "You are a test.", questions.train)
    for index, one in enumerate(questions.train):
        ours = _block_outputs(tiny_base, tiny_model, "You are a test.", one)
        distances = [
            1 - F.cosine_similarity(ours, _block_outputs(tiny_base, tiny_model, reference.system_prompt, one), dim=-1)
            for reference in load_references()
        ]
        wanted = float(torch.stack(distances).mean())
        assert found.sensitivity(one.id, units[index]) == pytest.approx(wanted, abs=2e-3)


def _block_outputs(base: Base, model: torch.nn.Module, system_prompt: str, question: Instruction) -> torch.Tensor:
    tokens = torch.tensor([question_prompt(base, system_prompt, question.text)])
    captured: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(
            lambda _module, _inputs, output: captured.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        for layer in range(base.shape.num_layers)
    ]
    with torch.no_grad(), forward_context(ReferenceContext()):
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([states[0, -1] for states in captured])


def test_the_reference_pass_is_kept_and_read_back(tiny_base: Base, tiny_model: torch.nn.Module, tmp_path: Path) -> None:
    questions = InstructionSet((_question(0),), (_question(1),), (_question(2),))
    first = reference_pass(tiny_base, lambda: tiny_model, questions, tmp_path)

    def never() -> torch.nn.Module:
        raise AssertionError("the kept pass is read, not run")

    second = reference_pass(tiny_base, never, questions, tmp_path)
    torch.testing.assert_close(second.mean_units["t-0"], first.mean_units["t-0"])


def test_selection_takes_the_most_sensitive_within_the_topic_cap() -> None:
    scored = [(_question(index, topic), 1.0 - index / 100) for topic in "abcdefghijkl" for index in range(10)]
    kept = select(scored, keep_fraction=0.4, topic_cap=0.1)
    assert len(kept) == 48
    by_topic: dict[str, int] = {}
    for one, _ in kept:
        by_topic[one.topic] = by_topic.get(one.topic, 0) + 1
    assert max(by_topic.values()) <= 5
    assert [score for _, score in kept] == sorted((score for _, score in kept), reverse=True)


def test_selection_of_a_single_topic_is_not_starved_by_the_cap() -> None:
    kept = select([(_question(index), float(index)) for index in range(10)], keep_fraction=0.4, topic_cap=0.1)
    assert [one.id for one, _ in kept] == ["t-9", "t-8", "t-7", "t-6"]
