"""Reconstruction: what least squares promises, in every family, against plain float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masquerade_engine.base import load_base
from masquerade_engine.context import forward_context
from masquerade_engine.reference import reference_logits
from masquerade_engine.seams import persona_ffns
from masquerade_masks import SculptCancelled
from masquerade_pruner.changes import Change, kept_weights
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.mask_learning import plant_examples, top_k_mask
from masquerade_pruner.reconstruction import _Pass, reconstructed
from masquerade_pruner.tree import Forward, TreeContext, masked

MakeExamples = Callable[..., list[Example]]


@pytest.fixture(scope="session")
def mask(tiny_model: torch.nn.Module) -> torch.Tensor:
    ffns = persona_ffns(tiny_model)
    shape = (len(ffns), ffns[0].get_parameter("down_proj.weight").shape[1])
    return top_k_mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)), 64)


def with_down(bare: Change, down: torch.Tensor) -> Forward:
    return replace(bare, tensors={"down_proj.weight": down}).forward


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("mistral", {"sliding_window": 8}), ("qwen2", {}), ("qwen3", {"head_dim": 12})],
)
def test_blocks_by_themselves_are_the_base(
    make_tiny_base: Callable[..., Path],
    tmp_path: Path,
    make_examples: MakeExamples,
    family: str,
    config: dict[str, int],
) -> None:
    """A pass that leaves every layer ends where the whole decoder does, for the dense base and for the change."""
    directory = make_tiny_base(tmp_path / "base", family, **config)
    model = load_base(str(directory), cache_dir=tmp_path, dtype="fp32", device="cpu").build_model()
    examples = make_examples(5)
    ffns = persona_ffns(model)
    everything = torch.ones(len(ffns), ffns[0].get_parameter("down_proj.weight").shape[1])
    one = _Pass(Change.of_mask(model, everything), examples, prompt_share=1.0)
    tree = plant_examples(examples, model).tree
    with torch.no_grad():
        for layer in range(len(ffns)):
            one.enter(layer)
            one.leave(layer)
        wanted = masked(model)(tree)
        for stream in (one._dense, one._changed):
            with forward_context(TreeContext(tree)):
                normed = model.get_submodule("model.norm")(stream)
            torch.testing.assert_close(normed[0], wanted, atol=1e-5, rtol=1e-5)


def test_neurons_that_stand_in_exactly_are_found(
    tiny_base_dir: Path, tmp_path: Path, make_examples: MakeExamples
) -> None:
    """Dropped neurons that say what kept ones say: their columns add up, and nothing is lost."""
    model = load_base(str(tiny_base_dir), cache_dir=tmp_path, dtype="fp32", device="cpu").build_model()
    wanted = []
    with torch.no_grad():
        for ffn in persona_ffns(model):
            for name in ("gate_proj.weight", "up_proj.weight"):
                weight = ffn.get_parameter(name)
                weight[64:] = weight[: len(weight) - 64]
            down = ffn.get_parameter("down_proj.weight")
            wanted.append(down[:, :64].index_add(1, torch.arange(down.shape[1] - 64), down[:, 64:]))
    mask = torch.zeros(len(wanted), down.shape[1])
    mask[:, :64] = 1
    bare = Change.of_mask(model, mask)
    examples = make_examples(80)
    found = reconstructed(bare, examples, ridge=1e-7)
    torch.testing.assert_close(found, torch.stack(wanted), atol=2e-3, rtol=0)
    held_out = HeldOut(model, make_examples(8, seed=1))
    before = float(held_out.divergence(bare.forward).kl.mean())
    assert float(held_out.divergence(with_down(bare, found)).kl.mean()) < 1e-3 * before


def test_the_first_layer_is_the_ridge_regression_in_float64(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    """One example is one plain row, so hooks see what a layer gets and gives; the ridge as rows that are appended."""
    (example,) = make_examples(1)
    ridge = 0.2
    seen: dict[str, torch.Tensor] = {}
    block = tiny_model.get_submodule("model.layers.0")
    hooks = [
        block.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, given: seen.update(acts=given[0][0])),
        block.get_submodule("mlp").register_forward_hook(lambda _module, _given, out: seen.update(ffn=out[0])),
        block.register_forward_hook(lambda _module, _given, out: seen.update(stream=out[0])),
    ]
    reference_logits(tiny_model, torch.tensor([[*example.prompt, *example.answer]]))
    for hook in hooks:
        hook.remove()
    kept = mask[0].nonzero().squeeze(1)
    acts = seen["acts"][:, kept].double()
    weight = block.get_submodule("mlp.down_proj").get_parameter("weight")[:, kept].double()
    share = seen["stream"].double().square().mean(1).rsqrt().sqrt()[:, None]
    rows = share * acts
    pull = (ridge * rows.square().sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.float64)
    lacks = torch.cat([share * (seen["ffn"].double() - acts @ weight.T), torch.zeros(len(kept), len(weight))])
    wanted = weight + torch.linalg.lstsq(torch.cat([rows, pull]), lacks).solution.T
    found = reconstructed(Change.of_mask(tiny_model, mask), [example], ridge=ridge)
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-4, rtol=1e-3)


def test_it_is_nearer_to_the_base_than_the_bare_mask(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    examples = make_examples(24)
    bare = Change.of_mask(tiny_model, mask)
    held_out = HeldOut(tiny_model, examples)
    found = with_down(bare, reconstructed(bare, examples, ridge=0.3))
    assert float(held_out.divergence(found).kl.mean()) < 0.7 * float(held_out.divergence(bare.forward).kl.mean())


def test_a_large_ridge_stays_at_the_base(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    bare = Change.of_mask(tiny_model, mask)
    found = reconstructed(bare, make_examples(4), ridge=1e9)
    torch.testing.assert_close(found, kept_weights(bare)["down_proj.weight"], atol=1e-6, rtol=1e-5)


def test_with_every_neuron_there_is_nothing_to_make_up_for(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    """... not even where a layer has more neurons than there are tokens, and the ridge alone decides."""
    ffns = persona_ffns(tiny_model)
    bare = Change.of_mask(tiny_model, torch.ones(len(ffns), ffns[0].get_parameter("down_proj.weight").shape[1]))
    found = reconstructed(bare, make_examples(1), ridge=1e-2)
    torch.testing.assert_close(found, kept_weights(bare)["down_proj.weight"], atol=2e-5, rtol=1e-3)


def test_it_tells_of_each_layer_and_stops_where_it_is_told(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    bare, told = Change.of_mask(tiny_model, mask), []

    def on_layer(done: int) -> None:
        told.append(done)
        if done == 2:
            raise SculptCancelled()

    with pytest.raises(SculptCancelled):
        reconstructed(bare, make_examples(3), ridge=0.3, on_layer=on_layer)
    assert told == [1, 2]
    # Blocks are whole again, whoever stopped.
    assert "forward" not in vars(tiny_model.get_submodule("model.layers.0"))
