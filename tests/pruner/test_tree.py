"""A packed pass gives each branch what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from masquerade_engine.base import load_base
from masquerade_engine.reference import reference_logits
from masquerade_pruner.examples import Example
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import TreeContext, common_prefix, head_weight, plant, run_tree

MakeExamples = Callable[..., list[Example]]


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {}), ("mistral", {}), ("mistral", {"sliding_window": 12}), ("qwen2", {}), ("qwen3", {})],
)
def test_branches_match_the_reference_alone(
    make_tiny_base: Callable[..., Path],
    make_examples: MakeExamples,
    tmp_path: Path,
    model_type: str,
    config: dict[str, int],
) -> None:
    directory = make_tiny_base(tmp_path / "base", model_type, **config)
    base = load_base(str(directory), cache_dir=tmp_path, dtype="fp32", device="cpu")
    model = base.build_model()
    mask = (torch.rand(base.shape.num_layers, base.shape.intermediate_size) < 0.6).float()
    examples = make_examples(9)
    planted = plant_examples(examples, model)
    states = run_tree(model, planted.tree, TreeContext(planted.tree, mask))[planted.rows]
    logits = states @ head_weight(model).T
    for index, one in enumerate(examples):
        alone = reference_logits(model, torch.tensor([[*one.prompt, *one.answer]]), mask)[0]
        wanted = alone[len(one.prompt) - 1 : -1]
        torch.testing.assert_close(logits[planted.owners == index], wanted, atol=1e-4, rtol=0)


def test_targets_are_the_answers_and_weights_sum_to_one(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = make_examples(5)
    planted = plant_examples(examples, tiny_model)
    for index, one in enumerate(examples):
        mine = planted.owners == index
        assert tuple(planted.targets[mine].tolist()) == one.answer
        assert float(planted.weights[mine].sum()) == pytest.approx(1 / len(examples))


def test_equal_and_nested_sequences_keep_a_token_of_their_own(tiny_model: torch.nn.Module) -> None:
    sequences = [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]]
    tree = plant(sequences, torch.device("cpu"), torch.float32)
    assert tree.num_prefix == 2
    states = run_tree(tiny_model, tree, TreeContext(tree))
    assert torch.isfinite(states).all()
    torch.testing.assert_close(states[tree.last[0]], states[tree.last[1]])


def test_sequences_without_a_common_prefix(tiny_model: torch.nn.Module) -> None:
    sequences = [[1, 2, 3], [4, 5, 6, 7]]
    tree = plant(sequences, torch.device("cpu"), torch.float32)
    assert tree.num_prefix == 0
    logits = run_tree(tiny_model, tree, TreeContext(tree)) @ head_weight(tiny_model).T
    for last, sequence in zip(tree.last, sequences, strict=True):
        alone = reference_logits(tiny_model, torch.tensor([sequence]))[0, -1]
        torch.testing.assert_close(logits[last], alone, atol=1e-4, rtol=0)


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[5], [6]]) == 0
