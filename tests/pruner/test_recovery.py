"""Recovery learns, keeps what is best, stores what it measured, and goes on bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine.base import Base
from masquerade_engine.reference import reference_logits
from masquerade_pruner import SculptSpec
from masquerade_pruner.changes import Change, kept_weights, merged_weights
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import fluctuation
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.prior import Prior, SharedRecovery
from masquerade_pruner.reconstruction import reconstructed
from masquerade_pruner.recovery import (
    Recovered,
    Recoverer,
    Recovery,
    RecoverySettings,
    _start,
    dropped_means,
    recover,
)
from masquerade_pruner.tree import Forward
from masquerade_pruner.workdir import Workdir

MakeExamples = Callable[..., list[Example]]
KINDS: tuple[Recovery, ...] = ("vectors", "lora", "full")
SETTINGS = RecoverySettings(
    steps=12,
    branches_per_step=4,
    validate_every=3,
    num_means=8,
    lora_rank=4,
    lora_alpha=8.0,
    lora_learning_rate=3e-3,
    full_learning_rate=1e-3,
)


@pytest.fixture(scope="session")
def mask(tiny_base: Base) -> torch.Tensor:
    shape = (tiny_base.shape.num_layers, tiny_base.shape.intermediate_size)
    return top_k_mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)), 64)


@pytest.fixture(scope="session")
def divergence(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> Callable[[Forward], float]:
    """Mean KL on examples of seed 5: random text has nothing in common with random text of another seed."""
    held_out = HeldOut(tiny_model, make_examples(8, seed=5))
    return lambda forward: float(held_out.divergence(forward).kl.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_recovery_lowers_the_divergence(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
    kind: Recovery,
) -> None:
    settings = replace(SETTINGS, steps=30)
    recovered = recover(tiny_model, mask, kind, make_examples(12, seed=5), divergence, settings)
    before = divergence(Change.of_mask(tiny_model, mask).forward)
    assert recovered.kind == kind
    assert recovered.history["unrecovered"] == pytest.approx(before)
    assert divergence(recovered.change.forward) < 0.9 * before
    assert divergence(recovered.change.forward) < recovered.history["validation"][0][1]  # steps, not the start alone
    assert recovered.history["loss"][-1] < recovered.history["loss"][0]


def test_cross_entropy_is_what_is_learned_where_it_is_asked_for(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    """On random answers the two losses pull apart: fitting them leads away from the base."""
    examples = make_examples(4)
    losses = {
        loss: recover(tiny_model, mask, "full", examples, divergence, replace(SETTINGS, steps=30), loss=loss).history[
            "loss"
        ]
        for loss in ("kl", "cross_entropy")
    }
    assert losses["cross_entropy"][0] > losses["kl"][0]
    assert losses["cross_entropy"][-1] < 0.9 * losses["cross_entropy"][0]


def test_what_is_measured_is_what_is_stored(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    recovered = recover(tiny_model, mask, "lora", make_examples(8, seed=5), divergence, SETTINGS)
    assert recovered.gain is not None
    assert recovered.bias is not None
    assert (recovered.gain.dtype, recovered.gain.shape) == (torch.float16, (3, 64))
    assert (recovered.bias.dtype, recovered.bias.shape) == (torch.float16, (3, 32))
    assert {one.dtype for one in recovered.lora.values()} == {torch.float16}
    assert recovered.full == {}
    low_rank = 2 * 3 * 3 * 4 * (32 + 96)  # bytes x layers x projections x rank x (in + out)
    assert recovered.num_bytes == 2 * 3 * (64 + 32) + low_rank
    figures = dict(map(tuple, recovered.history["validation"]))
    assert divergence(recovered.change.forward) == figures[recovered.history["best_step"]]


@pytest.mark.parametrize("kind", ["vectors", "lora"])
def test_it_starts_from_the_prior_where_that_is_better_and_fits(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
    kind: Recovery,
) -> None:
    examples = make_examples(12, seed=5)
    settings = replace(SETTINGS, steps=30)
    first = recover(tiny_model, mask, kind, examples, divergence, settings)
    known = SharedRecovery(first.change.kept, first.change.tensors)
    scores = {64: torch.zeros(mask.shape)}
    prior = Prior(scores, recoveries={(64, kind): known})
    still = replace(SETTINGS, steps=1, vectors_learning_rate=1e-9, lora_learning_rate=1e-9)
    second = recover(tiny_model, mask, kind, examples, divergence, still, prior=prior)
    assert second.history["start"] == "prior"
    assert divergence(second.change.forward) == pytest.approx(divergence(first.change.forward), rel=1e-6)
    for name, one in first.change.tensors.items():
        assert torch.equal(second.change.tensors[name], one), name

    other_rank = replace(still, lora_rank=3, biases=kind == "lora")
    apart = recover(tiny_model, mask, kind, examples, divergence, other_rank, prior=prior)
    assert apart.history["start"] != "prior"
    wild = {name: 50 * one for name, one in first.change.tensors.items()}
    worse = Prior(scores, recoveries={(64, kind): SharedRecovery(first.change.kept, wild)})
    assert recover(tiny_model, mask, kind, examples, divergence, still, prior=worse).history["start"] != "prior"


def test_own_weights_take_up_the_priors_low_rank_updates(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor, divergence: Callable[[Forward], float]
) -> None:
    examples = make_examples(12, seed=5)
    first = recover(tiny_model, mask, "lora", examples, divergence, replace(SETTINGS, steps=30))
    known = SharedRecovery(first.change.kept, first.change.tensors)
    prior = Prior({64: torch.zeros(mask.shape)}, recoveries={(64, "lora"): known})
    still = replace(SETTINGS, steps=1, full_learning_rate=1e-9)
    found = recover(tiny_model, mask, "full", examples, divergence, still, prior=prior)
    merged = merged_weights(first.change)
    without_bias = {name: one for name, one in first.change.tensors.items() if name != "bias"}
    of_prior = divergence(replace(first.change, tensors=without_bias).forward)
    assert found.history["validation"][0] == [0, pytest.approx(of_prior, rel=1e-3)]
    assert of_prior < found.history["unrecovered"]
    for name in ("gate_proj.weight", "up_proj.weight"):
        torch.testing.assert_close(found.change.tensors[name], merged[name])
    solved = reconstructed(replace(first.change, tensors=merged), examples, ridge=still.ridge)
    wanted = torch.lerp(merged["down_proj.weight"], solved, still.solved_share)
    torch.testing.assert_close(found.change.tensors["down_proj.weight"], wanted)

    wild = {name: 50 * one for name, one in first.change.tensors.items()}
    worse = Prior(prior.scores, recoveries={(64, "lora"): SharedRecovery(first.change.kept, wild)})
    apart = recover(tiny_model, mask, "full", examples, divergence, still, prior=worse)
    alone = recover(tiny_model, mask, "full", examples, divergence, still)
    assert apart.history["validation"][-1] == alone.history["validation"][-1]


def test_own_weights_are_stored_in_the_bases_type(tiny_base: Base, mask: torch.Tensor) -> None:
    model = tiny_base.build_model(torch.bfloat16)
    bare = Change.of_mask(model, mask)
    weights = {"up_proj.weight": torch.randn(3, 64, 32)}
    change = Recoverer(Change(model, bare.kept, weights), SETTINGS).change()
    assert torch.equal(change.tensors["up_proj.weight"], weights["up_proj.weight"].bfloat16())


def test_a_recovery_that_makes_it_worse_is_left_out(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    wild = replace(SETTINGS, vectors_learning_rate=1e4, biases=False)
    recovered = recover(tiny_model, mask, "vectors", make_examples(8), divergence, wild)
    assert recovered.kind == "none"
    assert recovered.gain is None
    assert recovered.num_bytes == 0
    assert recovered.history["best_step"] is None
    json.dumps(recovered.history, allow_nan=False)


def test_the_best_step_is_kept_and_not_the_last(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    figures = iter([5.0, 4.0, 1.0, 3.0, 2.0, 1.0])  # the mask by itself, then steps 0, 3, 6, 9 and 12
    seen: list[Forward] = []

    def validation(forward: Forward) -> float:
        seen.append(forward)
        return next(figures)

    recovered = recover(tiny_model, mask, "vectors", make_examples(8), validation, SETTINGS)
    assert recovered.history["best_step"] == 3
    assert recovered.history["validation"] == [[0, 4.0], [3, 1.0], [6, 3.0], [9, 2.0], [12, 1.0]]
    assert recovered.change.forward == seen[2]


def test_no_recovery_measures_and_trains_nothing(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    def never(forward: Forward) -> float:
        raise AssertionError

    recovered = recover(tiny_model, mask, "none", make_examples(1), never, SETTINGS)
    assert torch.equal(recovered.change.kept, mask.nonzero()[:, 1].view(3, 64))
    assert (recovered.kind, recovered.num_bytes) == ("none", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_at", [2, 9])  # before the first checkpoint, and after it
def test_a_stopped_recovery_ends_the_same_bit_for_bit(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
    tmp_path: Path,
    kind: Recovery,
    stop_at: int,
) -> None:
    examples = make_examples(6, seed=5)
    steps: list[int] = []

    def run(name: str, on_step: Callable[[int, float], None]) -> Recovered:
        workdir = Workdir(tmp_path / name, {})
        return recover(tiny_model, mask, kind, examples, divergence, SETTINGS, seed=3, workdir=workdir, on_step=on_step)

    def stop(step: int, loss: float) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    whole = run("whole", lambda step, loss: None)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    resumed = run("stopped", lambda step, loss: steps.append(step))
    assert steps[0] == (1 if stop_at == 2 else 9)
    assert resumed.history == whole.history
    _equal(resumed, whole)
    again = run("stopped", lambda step, loss: steps.append(-1))
    assert -1 not in steps
    _equal(again, whole)


def _equal(one: Recovered, other: Recovered) -> None:
    assert one.change.tensors.keys() == other.change.tensors.keys()
    assert one.change.tensors
    for name, tensor in other.change.tensors.items():
        assert torch.equal(one.change.tensors[name], tensor), name


def test_a_restored_learner_goes_on_bit_for_bit(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    examples = make_examples(4)
    bare = Change.of_mask(tiny_model, mask)
    start = replace(bare, tensors={"gain": torch.ones(3, 64)})
    whole, first, second = (Recoverer(start, SETTINGS) for _ in range(3))
    for _ in range(8):
        whole.step(examples)
    for _ in range(5):
        first.step(examples)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for _ in range(3):
        second.step(examples)
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_run_a_step_gives_its_gradients(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor, kind: Recovery
) -> None:
    examples = make_examples(5)
    start = _start(kind, Change.of_mask(tiny_model, mask), SETTINGS, seed=0)

    def gradients(**ways: Any) -> tuple[float, dict[str, torch.Tensor]]:
        learner = Recoverer(start, SETTINGS, **ways)
        loss = learner.step(examples)
        return loss, {name: one.grad for name, one in learner._parameters.items() if one.grad is not None}

    whole_loss, whole = gradients()
    assert set(whole) == set(start.tensors)
    for ways in ({"checkpointing": True}, {"micro_batch": 2}, {"micro_batch": 1, "checkpointing": True}):
        loss, found = gradients(**ways)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        for name, one in whole.items():
            torch.testing.assert_close(found[name], one, atol=1e-5 * float(one.abs().max()) + 1e-9, rtol=1e-4)


def test_biases_start_at_the_dropped_neurons_mean_contribution(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor
) -> None:
    """One example is one plain sequence, so a hook on the down projection sees the same activations."""
    (example,) = make_examples(1)
    seen: list[torch.Tensor] = []
    down = tiny_model.get_submodule("model.layers.1.mlp.down_proj")
    hook = down.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    reference_logits(tiny_model, torch.tensor([[*example.prompt, *example.answer]]))
    hook.remove()
    dropped = mask[1] == 0
    wanted = down.get_parameter("weight")[:, dropped] @ seen[0][0][:, dropped].mean(dim=0)
    bias = dropped_means(Change.of_mask(tiny_model, mask), fluctuation(tiny_model, [example]).mean)
    torch.testing.assert_close(bias[1], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("helps", [True, False])
def test_biases_start_at_zero_where_the_means_do_not_help(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor, helps: bool
) -> None:
    figures = iter([2.0, 1.0 if helps else 3.0, 0.5])  # the mask by itself, with the means, trained
    still = replace(SETTINGS, steps=1, vectors_learning_rate=1e-9)
    examples = make_examples(8)
    recovered = recover(tiny_model, mask, "vectors", examples, lambda forward: next(figures), still)
    means = dropped_means(Change.of_mask(tiny_model, mask), fluctuation(tiny_model, examples).mean)
    assert recovered.bias is not None
    torch.testing.assert_close(recovered.bias.float(), means if helps else torch.zeros_like(means), atol=1e-3, rtol=0)


def test_own_weights_start_where_least_squares_say(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, mask: torch.Tensor, divergence: Callable[[Forward], float]
) -> None:
    examples = make_examples(24, seed=5)
    still = replace(SETTINGS, steps=1, full_learning_rate=1e-9, num_reconstructed=8, solved_share=0.5)
    layers: list[int] = []
    found = recover(tiny_model, mask, "full", examples, divergence, still, on_layer=layers.append)
    assert found.history["start"] == "reconstruction"
    assert layers == [1, 2, 3]
    bare = Change.of_mask(tiny_model, mask)
    base = kept_weights(bare)
    solved = reconstructed(bare, examples[::3], ridge=still.ridge)  # at even distances
    for name in ("gate_proj.weight", "up_proj.weight"):
        torch.testing.assert_close(found.change.tensors[name], base[name])
    wanted = (base["down_proj.weight"] + solved) / 2
    torch.testing.assert_close(found.change.tensors["down_proj.weight"], wanted)


def test_low_rank_updates_start_at_nothing(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    plain = replace(SETTINGS, steps=3, biases=False, vectors_learning_rate=0.0, lora_learning_rate=1e-9)
    recovered = recover(tiny_model, mask, "lora", make_examples(4), divergence, plain)
    assert recovered.history["validation"][0][1] == pytest.approx(recovered.history["unrecovered"], rel=1e-5)


def test_the_seed_orders_the_examples(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    losses = [
        recover(
            tiny_model, mask, "vectors", make_examples(12), divergence, replace(SETTINGS, steps=3), seed=seed
        ).history["loss"]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert all(loss > 0 for loss in itertools.chain(*losses))


def test_question_tokens_are_supervised_where_that_is_asked(
    tiny_model: torch.nn.Module,
    make_examples: MakeExamples,
    mask: torch.Tensor,
    divergence: Callable[[Forward], float],
) -> None:
    short = replace(SETTINGS, steps=1)
    losses = [
        recover(tiny_model, mask, "vectors", make_examples(4), divergence, short, question_share=share).history["loss"]
        for share in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("preset", "steps"), [("smoke", (4, 4)), ("default", (8, 24)), ("thorough", (120, 120))])
def test_vectors_take_fewer_steps_where_more_gain_nothing(preset: str, steps: tuple[int, int]) -> None:
    kinds: tuple[Recovery, ...] = ("vectors", "lora")
    specs = [SculptSpec("wyn", "Wyn", "You row a ferry.", preset=preset, recovery=kind) for kind in kinds]
    assert tuple(spec.settings.recovery.steps for spec in specs) == steps
