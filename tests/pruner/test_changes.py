"""A change computes what the float64 reference computes with its weights changed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masquerade_engine.base import Base, load_base
from masquerade_engine.reference import reference_logits
from masquerade_masks import MaskShapeError
from masquerade_pruner.changes import Change, full_tensors, kept_weights, lora_tensors, moved
from masquerade_pruner.examples import Example
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import head_weight

MakeExamples = Callable[..., list[Example]]
KEPT, RANK, SCALE = 48, 4, 0.5
KINDS = ("mask", "gain", "vectors", "lora", "full")


def random_mask(base: Base, kept: int = KEPT, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(base.shape.num_layers, base.shape.intermediate_size, generator=generator)
    return torch.zeros_like(scores).scatter_(1, scores.topk(kept, dim=1).indices, 1.0)


def random_change(model: torch.nn.Module, mask: torch.Tensor, kind: str) -> Change:
    """In float64, far from the start of any recovery."""
    bare = Change.of_mask(model, mask)
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layers, kept = bare.kept.shape
    weights = kept_weights(bare)
    tensors: dict[str, torch.Tensor] = {}
    if kind in ("gain", "vectors", "lora"):
        tensors["gain"] = 1 + 0.3 * normal(layers, kept)
    if kind in ("vectors", "lora"):
        tensors["bias"] = 0.2 * normal(layers, weights["down_proj.weight"].shape[1])
    if kind == "lora":
        for name, weight in weights.items():
            projection = name.removesuffix(".weight")
            tensors[f"{projection}.lora_A"] = 0.3 * normal(layers, RANK, weight.shape[2])
            tensors[f"{projection}.lora_B"] = 0.3 * normal(layers, weight.shape[1], RANK)
    if kind == "full":
        tensors = {name: weight + 0.1 * normal(*weight.shape) for name, weight in weights.items()}
    return Change(model, bare.kept, tensors, SCALE)


def by_hand(
    base: Base, change: Change, mask: torch.Tensor
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor | None]:
    """A fresh float64 model whose own weights were changed, with the coefficients and biases that go with it."""
    model = base.build_model(torch.float64)
    _add_low_rank(model, lora_tensors(change))
    _replace_rows(model, full_tensors(change), change.kept)
    coefficients = mask.double()
    if "gain" in change.tensors:
        coefficients = coefficients.scatter(1, change.kept, change.tensors["gain"])
    return model, coefficients, change.tensors.get("bias")


def _add_low_rank(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        place = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        model.get_parameter(place).data += SCALE * up @ down


def _replace_rows(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], kept: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        weight, rows = model.get_parameter(name).data, kept[int(name.split(".")[2])]
        if "down_proj" in name:
            weight[:, rows] = tensor
        else:
            weight[rows] = tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_states_equal_the_reference_with_weights_changed_by_hand(
    make_tiny_base: Callable[..., Path], make_examples: MakeExamples, tmp_path: Path, model_type: str, kind: str
) -> None:
    base = load_base(str(make_tiny_base(tmp_path / "base", model_type)), cache_dir=tmp_path, dtype="fp32", device="cpu")
    mask = random_mask(base)
    change = random_change(base.build_model(torch.float64), mask, kind)
    model, coefficients, biases = by_hand(base, change, mask)
    examples = make_examples(5)
    planted = plant_examples(examples, change.model)
    logits = change.forward(planted.tree)[planted.rows] @ head_weight(change.model).T
    for index, one in enumerate(examples):
        wanted = reference_logits(model, torch.tensor([[*one.prompt, *one.answer]]), coefficients, biases)
        torch.testing.assert_close(
            logits[planted.owners == index],
            wanted[0, len(one.prompt) - 1 : -1],
            atol=1e-4,  # transformers' norms compute in float32
            rtol=0,
        )


@pytest.mark.parametrize("kind", ["vectors", "lora", "full"])
def test_gradients_match_finite_differences(tiny_base: Base, make_examples: MakeExamples, kind: str) -> None:
    model = tiny_base.build_model(torch.float64)
    change = random_change(model, random_mask(tiny_base), kind)
    tree = plant_examples(make_examples(3), model).tree
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(tree.token_ids.shape[1], tiny_base.shape.hidden_size, generator=generator, dtype=torch.float64)

    def value(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (Change(model, change.kept, tensors, SCALE).forward(tree) * probe).mean()

    parameters = {name: tensor.clone().requires_grad_() for name, tensor in change.tensors.items()}
    gradients = torch.autograd.grad(value(parameters), list(parameters.values()))
    for (name, tensor), gradient in zip(change.tensors.items(), gradients, strict=True):
        direction = gradient / gradient.norm()
        high, low = (value({**change.tensors, name: tensor + sign * 2e-3 * direction}) for sign in (1, -1))
        assert float(gradient.norm()) == pytest.approx(float(high - low) / 4e-3, rel=0.01), name


def test_gains_are_applied_in_fp32_on_a_bf16_base(tiny_base: Base, make_examples: MakeExamples) -> None:
    """A gain of 1.003 is 1 in bf16, and yet moves the activations that lie near a rounding boundary."""
    model = tiny_base.build_model(torch.bfloat16)
    change = Change.of_mask(model, random_mask(tiny_base))
    tree = plant_examples(make_examples(6), model).tree
    gain = torch.full(change.kept.shape, 1.003, dtype=torch.float16)
    with torch.no_grad():
        moved = Change(model, change.kept, {"gain": gain}).forward(tree)
        assert float((moved - change.forward(tree)).abs().max()) > 0


def test_exported_tensors_have_peft_and_base_names(tiny_model: torch.nn.Module, tiny_base: Base) -> None:
    mask = random_mask(tiny_base)
    hidden, intermediate = tiny_base.shape.hidden_size, tiny_base.shape.intermediate_size
    lora = lora_tensors(random_change(tiny_model, mask, "lora"))
    layer = "base_model.model.model.layers.2.mlp"
    assert len(lora) == 3 * 3 * 2
    assert lora[f"{layer}.gate_proj.lora_A.weight"].shape == (RANK, hidden)
    assert lora[f"{layer}.up_proj.lora_B.weight"].shape == (intermediate, RANK)
    assert lora[f"{layer}.down_proj.lora_A.weight"].shape == (RANK, intermediate)
    assert lora[f"{layer}.down_proj.lora_B.weight"].shape == (hidden, RANK)
    dropped = mask[2] == 0
    assert lora[f"{layer}.up_proj.lora_B.weight"][dropped].eq(0).all()
    assert lora[f"{layer}.down_proj.lora_A.weight"][:, dropped].eq(0).all()
    full = full_tensors(random_change(tiny_model, mask, "full"))
    assert len(full) == 3 * 3
    assert full["model.layers.0.mlp.gate_proj.weight"].shape == (KEPT, hidden)
    assert full["model.layers.0.mlp.down_proj.weight"].shape == (hidden, KEPT)


def test_layers_that_keep_different_numbers_are_refused(tiny_model: torch.nn.Module, tiny_base: Base) -> None:
    mask = random_mask(tiny_base)
    mask[1, int(mask[1].argmax())] = 0
    with pytest.raises(MaskShapeError, match=r"\[48, 47, 48\]"):
        Change.of_mask(tiny_model, mask)


@pytest.mark.parametrize("kept", [1, 33, KEPT, 96])
def test_a_change_moved_to_other_neurons_says_of_each_what_it_said(
    tiny_base: Base, tiny_model: torch.nn.Module, kept: int
) -> None:
    change = random_change(tiny_model, random_mask(tiny_base), "lora")
    other = Change.of_mask(tiny_model, random_mask(tiny_base, kept, seed=1))
    num_neurons = tiny_base.shape.intermediate_size
    tensors = moved(change.tensors, change.kept, other.kept, num_neurons)
    both = torch.zeros(tiny_base.shape.num_layers, num_neurons).scatter_(1, change.kept, 1.0).gather(1, other.kept) > 0
    before, after = lora_tensors(change), lora_tensors(replace(other, tensors=tensors))
    for name, one in after.items():
        layer = int(name.split(".")[4])
        dropped = torch.ones(num_neurons).index_fill_(0, other.kept[layer], 0.0) > 0
        expected = before[name].clone()
        if num_neurons in expected.shape:
            expected.movedim(list(expected.shape).index(num_neurons), 0)[dropped] = 0.0
        assert torch.equal(one, expected), name
    assert torch.equal(tensors["gain"][~both], torch.ones_like(tensors["gain"][~both]))
    gains = torch.zeros(len(both), num_neurons, dtype=torch.float64).scatter_(1, change.kept, change.tensors["gain"])
    assert torch.equal(tensors["gain"][both], gains.gather(1, other.kept)[both])
    assert tensors["bias"] is change.tensors["bias"]
