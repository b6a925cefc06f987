"""Checkpointing and micro-batches change what a step holds, and its gradient within rounding only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine.base import load_base
from masquerade_engine.seams import PersonaFFN, decoder_layers
from masquerade_pruner.examples import Example
from masquerade_pruner.importance import fisher_importance
from masquerade_pruner.mask_learning import MaskLearner, plant_examples
from masquerade_pruner.tree import Tree, TreeContext, run_tree

MakeExamples = Callable[..., list[Example]]
SHAPE = (3, 96)


def learner_of(model: torch.nn.Module, **ways: object) -> MaskLearner:
    start = torch.rand(SHAPE, generator=torch.Generator().manual_seed(4))
    return MaskLearner(model, start, 64, steps=10, learning_rate=0.01, **ways)  # type: ignore[arg-type]


def gradient(model: torch.nn.Module, examples: list[Example], **ways: object) -> tuple[float, torch.Tensor]:
    learner = learner_of(model, **ways)
    loss = learner.step(examples)
    assert learner.scores.grad is not None
    return loss, learner.scores.grad


class CountingContext(TreeContext):
    """Counts how often each FFN is run."""

    def __init__(self, tree: Tree, mask: torch.Tensor) -> None:
        super().__init__(tree, mask)
        self.calls: list[int] = []

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(module.layer)
        return super().ffn(module, hidden)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {}), ("mistral", {}), ("mistral", {"sliding_window": 12}), ("qwen2", {}), ("qwen3", {})],
)
@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_every_way_to_run_a_step_gives_its_gradient(
    make_tiny_base: Callable[..., Path],
    make_examples: MakeExamples,
    tmp_path: Path,
    model_type: str,
    config: dict[str, int],
    loss: str,
) -> None:
    directory = make_tiny_base(tmp_path / "base", model_type, **config)
    model = load_base(str(directory), cache_dir=tmp_path, dtype="fp32", device="cpu").build_model()
    examples = make_examples(7)
    whole_loss, whole = gradient(model, examples, loss=loss)
    scale = float(whole.abs().max())
    for ways in ({"checkpointing": True}, {"micro_batch": 2}, {"micro_batch": 1, "checkpointing": True}):
        found_loss, found = gradient(model, examples, loss=loss, **ways)
        assert found_loss == pytest.approx(whole_loss, rel=1e-5)
        torch.testing.assert_close(found, whole, atol=1e-5 * scale, rtol=1e-4)


def test_the_backward_pass_runs_every_block_again_in_a_thread_without_a_context(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    planted = plant_examples(make_examples(3), tiny_model)
    mask = torch.ones(SHAPE, requires_grad=True)
    context = CountingContext(planted.tree, mask)
    states = run_tree(tiny_model, planted.tree, context, checkpointing=True)
    assert context.calls == [0, 1, 2]
    failures: list[BaseException] = []

    def backward() -> None:
        try:
            torch.autograd.backward(states.sum())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=backward)  # as autograd's own thread of a GPU: no context variable is set in it
    thread.start()
    thread.join()
    assert not failures, failures[0]
    assert sorted(context.calls) == [0, 0, 1, 1, 2, 2]
    assert mask.grad is not None
    assert bool(mask.grad.ne(0).any(dim=1).all())


def test_a_pass_without_gradient_runs_once_and_blocks_are_left_as_they_were(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    planted = plant_examples(make_examples(3), tiny_model)
    context = CountingContext(planted.tree, torch.ones(SHAPE))
    with torch.no_grad():
        run_tree(tiny_model, planted.tree, context, checkpointing=True)
    assert context.calls == [0, 1, 2]
    run_tree(tiny_model, planted.tree, CountingContext(planted.tree, torch.ones(SHAPE)), checkpointing=True)
    assert all("forward" not in vars(block) for block in decoder_layers(tiny_model))


def test_checkpointing_keeps_little_but_the_blocks_inputs(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    planted = plant_examples(make_examples(7), tiny_model)

    def kept(checkpointing: bool) -> int:
        """Bytes that live on with the graph, of tensors made in the pass."""
        before = {id(one) for one in torch.nn.ParameterList(tiny_model.parameters())}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in before:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        mask = torch.ones(SHAPE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run_tree(tiny_model, planted.tree, TreeContext(planted.tree, mask), checkpointing=checkpointing)
        return sum(sizes.values())

    assert kept(True) < 0.2 * kept(False)


def test_fisher_importance_is_the_same_in_micro_batches(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = make_examples(8)
    whole = fisher_importance(tiny_model, examples, batch=4)
    parts = fisher_importance(tiny_model, examples, batch=4, micro_batch=1, checkpointing=True)
    torch.testing.assert_close(parts, whole, atol=1e-6 * float(whole.max()), rtol=1e-3)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_no_tensor_of_a_step_is_left_on_the_processor(
    tiny_base_dir: Path, make_examples: MakeExamples, tmp_path: Path, loss: str
) -> None:
    """On the meta device, as on a GPU, an operation on tensors of two devices fails."""
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path, dtype="bf16", device="cpu")
    model = base.build_model()
    planted = on_meta(plant_examples(make_examples(3), model))
    model.to("meta")
    for checkpointing in (False, True):
        learner = learner_of(model, loss=loss, checkpointing=checkpointing)
        value = learner._loss_of(planted)
        torch.autograd.backward(value)
        assert value.device.type == "meta"
        assert learner.scores.grad is not None
        assert learner.scores.grad.device.type == learner.mask().device.type == "meta"


def on_meta(value: Any) -> Any:
    """A dataclass of tensors, dataclasses and tuples of them, with every tensor on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple):
        return tuple(on_meta(one) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: on_meta(getattr(value, one.name)) for one in fields(value)})
    return value
