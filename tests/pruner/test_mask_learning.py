from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from masquerade_engine.reference import reference_logits
from masquerade_pruner.examples import Example
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.importance import activation_importance, averaged_ranks, fisher_importance
from masquerade_pruner.losses import chunked_cross_entropy, chunked_kl, token_kl
from masquerade_pruner.mask_learning import DampedAdam, MaskLearner, plant_examples, top_k_mask
from masquerade_pruner.tree import masked

MakeExamples = Callable[..., list[Example]]


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_chunked_kl_and_its_gradient_match_autograd_in_float64(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, 16, generator=generator) for _ in range(2))
    head = torch.randn(40, 16, generator=generator)
    weights = torch.rand(rows, generator=generator)
    weights /= weights.sum()
    ours = student.clone().requires_grad_()
    loss = chunked_kl(ours, teacher, head, weights)
    loss.backward()
    exact = student.double().requires_grad_()
    target = (teacher.double() @ head.double().T).log_softmax(-1)
    predicted = (exact @ head.double().T).log_softmax(-1)
    wanted = ((target.exp() * (target - predicted)).sum(-1) * weights.double()).sum()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad.float(), atol=1e-5, rtol=1e-3)


def test_chunked_cross_entropy_and_its_gradient_match_autograd_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    student, head = torch.randn(150, 16, generator=generator), torch.randn(40, 16, generator=generator)
    targets = torch.randint(40, (150,), generator=generator)
    weights = torch.full((150,), 1 / 150)
    ours = student.clone().requires_grad_()
    loss = chunked_cross_entropy(ours, head, targets, weights)
    loss.backward()
    exact = student.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact @ head.double().T, targets)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, exact.grad.float(), atol=1e-5, rtol=1e-3)


def test_top_k_keeps_exactly_k_a_layer() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    assert top_k_mask(scores, 2).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert top_k_mask(torch.zeros(4, 10), 3).sum(dim=1).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("dropped_alone", [False, True])
def test_the_scores_receive_the_masks_gradient(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, dropped_alone: bool
) -> None:
    """Straight-through: dL/dz is dL/dmask, checked by finite differences of a neuron's coefficient."""
    examples = make_examples(3)
    shape = (3, 96)
    start = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    learner = MaskLearner(
        tiny_model, start, 64, steps=10, learning_rate=1e-9, loss="cross_entropy", dropped_alone=dropped_alone
    )
    mask = learner.mask()
    learner.step(examples)
    gradient = learner.scores.grad
    assert gradient is not None
    if dropped_alone:
        assert torch.equal(gradient.ne(0), mask.eq(0))
        neurons = ((0, int(mask[0].argmin())), (2, int(mask[2].argmin())))
    else:
        assert gradient.ne(0).all(dim=1).all()  # dropped neurons learn as well
        neurons = ((0, 5), (2, 80))
    for layer, neuron in neurons:
        nudged = [mask.clone() for _ in range(2)]
        nudged[0][layer, neuron] -= 0.01
        nudged[1][layer, neuron] += 0.01
        low, high = (_cross_entropy(tiny_model, examples, one) for one in nudged)
        assert float(gradient[layer, neuron]) == pytest.approx((high - low) / 0.02, rel=0.03, abs=1e-4)


def _cross_entropy(model: torch.nn.Module, examples: list[Example], mask: torch.Tensor) -> float:
    losses = []
    for one in examples:
        logits = reference_logits(model, torch.tensor([[*one.prompt, *one.answer]]), mask)[0]
        answer = torch.tensor(one.answer)
        losses.append(torch.nn.functional.cross_entropy(logits[len(one.prompt) - 1 : -1].double(), answer))
    return float(torch.stack(losses).mean())


def test_learning_lowers_the_divergence(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> None:
    examples = make_examples(8)
    start = torch.rand(3, 96, generator=torch.Generator().manual_seed(0))
    learner = MaskLearner(tiny_model, start, 48, steps=40, learning_rate=0.05)
    held_out = HeldOut(tiny_model, examples)
    before = held_out.divergence(masked(tiny_model, learner.mask())).kl.mean()
    for _ in range(40):
        learner.step(examples)
    assert held_out.divergence(masked(tiny_model, learner.mask())).kl.mean() < 0.8 * before


def test_a_restored_learner_goes_on_bit_for_bit(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> None:
    examples = make_examples(4)
    start = torch.rand(3, 96, generator=torch.Generator().manual_seed(0))

    def fresh() -> MaskLearner:
        return MaskLearner(tiny_model, start, 48, steps=12, learning_rate=0.02)

    whole = fresh()
    for _ in range(12):
        whole.step(examples)
    first = fresh()
    for _ in range(5):
        first.step(examples)
    second = fresh()
    second.restore({key: value.clone() for key, value in first.state().items()})
    for _ in range(7):
        second.step(examples)
    torch.testing.assert_close(second.scores, whole.scores, atol=0, rtol=0)


def test_small_gradients_count_by_their_size_and_large_ones_move_no_further_than_the_rate() -> None:
    moved = []
    for scale in (1.0, 1e-4):
        scores = torch.zeros(4, requires_grad=True)
        optimizer = DampedAdam([scores], lr=0.1)
        for _ in range(3):
            scores.grad = scale * torch.tensor([100.0, -0.02, 0.01, 0.0])
            optimizer.step()
        moved.append(scores.detach())
    torch.testing.assert_close(moved[0], moved[1])
    large, small, smaller, still = moved[0].tolist()
    assert large == pytest.approx(-3 * 0.1 / 1.5)  # √v = 100, and the root mean square of the four is 50
    assert small == pytest.approx(3 * 0.1 * 0.02 / 50, rel=1e-3)
    assert small == pytest.approx(-2 * smaller, rel=1e-3)
    assert still == 0


def test_the_mask_is_that_of_the_weighted_average(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> None:
    examples = make_examples(4)
    start = torch.rand(3, 96, generator=torch.Generator().manual_seed(0))
    learner = MaskLearner(tiny_model, start, 48, steps=6, learning_rate=0.2)
    assert torch.equal(learner.averaged(), start)
    total = torch.zeros_like(start)
    for number in range(1, 7):
        learner.step(examples)
        total += number * learner.scores.detach()
        torch.testing.assert_close(learner.averaged(), total / (number * (number + 1) / 2))
    assert torch.equal(learner.mask(), top_k_mask(learner.averaged(), 48))
    assert not torch.equal(learner.mask(), top_k_mask(learner.scores.detach(), 48))


def test_held_out_divergence_matches_the_reference_in_the_examples_order(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = make_examples(21)
    mask = (torch.rand(3, 96, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    found = HeldOut(tiny_model, examples).divergence(masked(tiny_model, mask))
    for index, one in enumerate(examples):
        tokens = torch.tensor([[*one.prompt, *one.answer]])
        rows = slice(len(one.prompt) - 1, -1)
        dense = reference_logits(tiny_model, tokens)[0, rows].double().log_softmax(-1)
        changed = reference_logits(tiny_model, tokens, mask)[0, rows].double().log_softmax(-1)
        assert float(found.kl[index]) == pytest.approx(
            float((dense.exp() * (dense - changed)).sum(-1).mean()), abs=1e-4
        )
        agreement = (dense.argmax(-1) == changed.argmax(-1)).double().mean()
        assert float(found.top1[index]) == pytest.approx(float(agreement), abs=1e-6)


def test_a_full_mask_diverges_from_nothing(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> None:
    divergence = HeldOut(tiny_model, make_examples(5)).divergence(masked(tiny_model, torch.ones(3, 96)))
    assert float(divergence.kl.abs().max()) < 1e-5
    assert divergence.top1.tolist() == [1.0] * 5


def test_token_kl_of_equal_states_is_nothing() -> None:
    states = torch.randn(5, 8)
    kl, agree = token_kl(states, states, torch.randn(30, 8))
    assert float(kl.abs().max()) < 1e-6
    assert bool(agree.all())


def test_importance_is_positive_and_ranks_are_in_the_unit_interval(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    examples = make_examples(6)
    wanda = activation_importance(tiny_model, examples, batch=4)
    fisher = fisher_importance(tiny_model, examples, batch=2)
    assert wanda.shape == fisher.shape == (3, 96)
    assert bool((wanda > 0).all())
    assert bool((fisher > 0).all())
    ranks = averaged_ranks(wanda, fisher)
    assert 0 <= float(ranks.min()) <= float(ranks.max()) <= 1


def test_activation_importance_matches_its_definition(tiny_model: torch.nn.Module, make_examples: MakeExamples) -> None:
    """One example is one plain sequence, so a hook on the down projection sees the same activations."""
    (example,) = make_examples(1)
    seen: list[torch.Tensor] = []
    down = tiny_model.get_submodule("model.layers.1.mlp.down_proj")
    hook = down.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    reference_logits(tiny_model, torch.tensor([[*example.prompt, *example.answer]]))
    hook.remove()
    wanted = seen[0][0].square().mean(dim=0).sqrt() * down.get_parameter("weight").norm(dim=0)
    torch.testing.assert_close(activation_importance(tiny_model, [example])[1], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_every_supervised_row_predicts_the_next_token_of_its_own_branch(
    tiny_model: torch.nn.Module, make_examples: MakeExamples, share: float
) -> None:
    examples = make_examples(9)
    planted = plant_examples(examples, tiny_model, question_share=share)
    row, positions = planted.tree.token_ids[0], planted.tree.positions[0]
    for index, one in enumerate(examples):
        mine = planted.owners == index
        tokens = (*one.prompt, *one.answer)
        places = positions[planted.rows[mine]].tolist()
        assert [tokens[place] for place in places] == row[planted.rows[mine]].tolist()
        assert [tokens[place + 1] for place in places] == planted.targets[mine].tolist()
        assert places[-len(one.answer) :] == list(range(len(one.prompt) - 1, len(tokens) - 1))
        before = planted.weights[mine][: -len(one.answer)]
        assert len(before) == (max(0, len(one.prompt) - planted.tree.num_prefix - 1) if share else 0)
        assert float(planted.weights[mine].sum()) == pytest.approx(1 / len(examples))
        if len(before):
            assert float(before.sum()) == pytest.approx(share / len(examples))


def test_a_pull_chooses_neurons_without_changing_scores(
    tiny_model: torch.nn.Module, make_examples: MakeExamples
) -> None:
    scores = torch.rand(3, 96, generator=torch.Generator().manual_seed(0))
    pull = torch.zeros(3, 96)
    pull[:, :48] = 2.0
    learner = MaskLearner(tiny_model, scores, 48, steps=2, learning_rate=1e-6, pull=pull)
    assert torch.equal(learner.mask(), (pull > 0).float())
    learner.step(make_examples(3))
    assert (learner.scores - scores).abs().max() < 1e-5
