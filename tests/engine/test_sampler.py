from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams
from masquerade_engine.sampler import sample
from masquerade_engine.sequence import Sequence

VOCAB = 1000
STOPS = frozenset({3, 5})


def make_sequence(prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    parameters = SamplingParams(**({"max_tokens": 50} | sampling))
    sequence = Sequence(
        Request("a", prompt, PersonaFunction("base:x", "cast"), parameters), Detokenizer(lambda tokens: "")
    )
    sequence.tokens += output
    return sequence


def pick(logits: torch.Tensor, **sampling: Any) -> int:
    return sample(logits[None], [make_sequence(**sampling)], STOPS)[0].token_id


def random_logits(spread: float, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def naive(logits: torch.Tensor, p: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Kept tokens in falling order and their renormalised probabilities, in float64."""
    probs = torch.softmax(logits.double() / p.temperature, -1)
    order = torch.argsort(logits, descending=True, stable=True)
    probs = probs[order].numpy()
    keep = int((probs >= p.min_p * probs[0]).sum())
    keep = min(keep, p.top_k) if p.top_k else keep
    sums = probs[:keep].cumsum()
    keep = int((sums - probs[:keep] < p.top_p * sums[-1]).sum()) if p.top_p < 1 else keep
    return order[:keep].numpy(), probs[:keep] / probs[:keep].sum()


def test_greedy_is_the_likeliest_beside_any_neighbour() -> None:
    logits = random_logits(3, rows=3)
    sampled = sample(logits, [make_sequence(temperature=0.0), make_sequence(), make_sequence(temperature=0.0)], STOPS)
    assert sampled[0].token_id == int(logits[0].argmax())
    assert sampled[2].token_id == int(logits[2].argmax())


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])  # flat: bounds reach beyond the prefilter; peaked: they do not
@pytest.mark.parametrize(
    "bounds",
    [
        {"top_p": 0.9},
        {"top_k": 7},
        {"top_k": 600},
        {"min_p": 0.05},
        {"min_p": 0.9, "top_k": 400},
        {"top_k": 300, "top_p": 0.95, "min_p": 0.001, "temperature": 0.7},
        {"top_p": 1e-6},
    ],
)
def test_bounds_are_exact(spread: float, bounds: dict[str, Any]) -> None:
    rows = 24
    logits = random_logits(spread, rows=rows)
    sequences = [make_sequence(seed=seed, **bounds) for seed in range(rows)]
    sampled = sample(logits, sequences, STOPS)
    for row in range(rows):
        twin = make_sequence(seed=row, **bounds)
        tokens, probs = naive(logits[row], twin.sampling)
        rank = int(np.searchsorted(probs.cumsum(), twin.draws.random(), side="right"))
        assert sampled[row].token_id == tokens[min(rank, len(tokens) - 1)]


def test_a_plain_draw_follows_the_distribution_in_its_tail_too() -> None:
    logits = random_logits(1.0)[0]
    draws = 4000
    sequence = make_sequence(seed=11)
    rows = sample(logits.expand(draws, -1), [sequence] * draws, STOPS)
    counts = np.bincount([row.token_id for row in rows], minlength=VOCAB)
    probs = torch.softmax(logits.double(), -1).numpy()
    order = probs.argsort()[::-1]
    for group in np.array_split(order, 8):  # heads and tails of the vocabulary
        expected = probs[group].sum() * draws
        assert abs(counts[group].sum() - expected) < 4 * np.sqrt(expected)


def test_a_seeded_request_draws_its_own_stream() -> None:
    logits = random_logits(1.0, rows=5)
    alone = [pick(logits[2], seed=5)]
    for neighbours in (1, 4):
        sequences = [make_sequence(seed=100 + i) for i in range(neighbours)] + [make_sequence(seed=5)]
        rows = torch.cat([logits[[0, 1, 3, 4]][:neighbours], logits[2:3]])
        alone.append(sample(rows, sequences, STOPS)[-1].token_id)
    assert len(set(alone)) == 1


def test_unseeded_requests_differ() -> None:
    logits = torch.zeros(20, VOCAB)
    sampled = sample(logits, [make_sequence() for _ in range(20)], STOPS)
    assert len({token.token_id for token in sampled}) > 10


def test_stop_tokens_are_barred_until_the_least_number_of_tokens() -> None:
    logits = torch.zeros(VOCAB)
    logits[3], logits[5], logits[9] = 9.0, 8.0, 7.0
    assert pick(logits, temperature=0.0, min_tokens=2, output=(1,)) == 9
    assert pick(logits, temperature=0.0, min_tokens=2, output=(1, 1)) == 3


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[10], logits[11], logits[12] = 2.0, 1.9, 1.8
    assert pick(logits, temperature=0.0, prompt=(10,), output=(11,), repetition_penalty=1.5) == 12
    negative = torch.full((VOCAB,), -9.0)
    negative[10], negative[11] = -1.0, -1.4
    assert pick(negative, temperature=0.0, prompt=(10,), repetition_penalty=1.5) == 11


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[10], logits[11] = 2.0, 1.0
    assert pick(logits, temperature=0.0, prompt=(10, 10), presence_penalty=1.5) == 10
    assert pick(logits, temperature=0.0, output=(10,), presence_penalty=1.5) == 11
    assert pick(logits, temperature=0.0, output=(10,), frequency_penalty=0.6) == 10
    assert pick(logits, temperature=0.0, output=(10, 10), frequency_penalty=0.6) == 11


def test_penalties_change_no_neighbour() -> None:
    logits = random_logits(1.0, rows=2)
    raw = logits.clone()
    sequences = [
        make_sequence(temperature=0.0, prompt=(1, 2, 3), repetition_penalty=2.0),
        make_sequence(temperature=0.0),
    ]
    sample(logits, sequences, STOPS)
    assert torch.equal(logits, raw)


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(2.0)[0]
    sequence = make_sequence(temperature=0.5, top_k=1, logprobs=3, repetition_penalty=1.3, prompt=tuple(range(900)))
    token = sample(logits[None], [sequence], STOPS)[0]
    raw = torch.log_softmax(logits, -1)
    assert token.logprob == pytest.approx(float(raw[token.token_id]), abs=1e-6)
    top = raw.topk(3)
    assert [t for t, _ in token.top_logprobs] == top.indices.tolist()
    assert [p for _, p in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-6)


def test_logprobs_may_be_asked_without_alternatives() -> None:
    token = sample(random_logits(2.0), [make_sequence(logprobs=0)], STOPS)[0]
    assert token.logprob is not None
    assert token.top_logprobs == ()


def test_a_vocabulary_smaller_than_the_prefilter() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert {pick(logits, seed=seed) for seed in range(60)} == {0, 1, 2}
    assert pick(logits, top_p=0.1, seed=1) == 2
