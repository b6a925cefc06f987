from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from masquerade_engine import Base, Engine, EngineSettings, sampler
from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams
from masquerade_engine.sampler import Sampler
from masquerade_engine.sequence import SampledToken, Sequence

VOCAB = 1000
WIDE = 16 * 700 + 5  # of lanes, with a rest that fills none
STOPS = frozenset({3, 5})


def make_sequence(prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    parameters = SamplingParams(**({"max_tokens": 50} | sampling))
    sequence = Sequence(
        Request("a", prompt, PersonaFunction("base:x", "cast"), parameters), Detokenizer(lambda tokens: "")
    )
    sequence.tokens += output
    return sequence


def sample(logits: torch.Tensor, sequences: list[Sequence], stop_token_ids: frozenset[int]) -> list[SampledToken]:
    """A single step."""
    return Sampler(stop_token_ids).sample(logits, sequences)


def pick(logits: torch.Tensor, **sampling: Any) -> int:
    return sample(logits[None], [make_sequence(**sampling)], STOPS)[0].token_id


def random_logits(spread: float, seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


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


@pytest.fixture(params=["compiled", "torch"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded draws in the loop of the CPU, and in the torch operations of other devices."""
    if request.param == "torch":
        monkeypatch.setattr(sampler, "_has_loops", lambda device: False)


def test_greedy_is_the_likeliest_beside_any_neighbour() -> None:
    logits = random_logits(3, rows=3)
    sampled = sample(logits, [make_sequence(temperature=0.0), make_sequence(), make_sequence(temperature=0.0)], STOPS)
    assert sampled[0].token_id == int(logits[0].argmax())
    assert sampled[2].token_id == int(logits[2].argmax())


@pytest.mark.parametrize("vocab", [VOCAB, WIDE])
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
@pytest.mark.usefixtures("drawn")
def test_bounds_are_exact(vocab: int, spread: float, bounds: dict[str, Any]) -> None:
    rows = 24
    logits = random_logits(spread, rows=rows, vocab=vocab)
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


@pytest.mark.usefixtures("drawn")
def test_a_row_draws_the_same_beside_rows_of_other_kinds() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1, "logprobs": 2},
        {"top_k": 400},
        {"repetition_penalty": 1.2},
    ]
    logits = random_logits(1.0, rows=len(kinds), vocab=WIDE)
    alone = [
        sample(logits[row : row + 1], [make_sequence(seed=row, **kind)], STOPS)[0].token_id
        for row, kind in enumerate(kinds)
    ]
    for shift in range(len(kinds)):
        order = [(row + shift) % len(kinds) for row in range(len(kinds))]
        sampled = sample(logits[order], [make_sequence(seed=row, **kinds[row]) for row in order], STOPS)
        assert [one.token_id for one in sampled] == [alone[row] for row in order]


@pytest.mark.usefixtures("drawn")
def test_steps_of_other_sizes_leave_nothing_behind() -> None:
    """One sampler for batches that grow and shrink, of any kinds, is a new one for each."""
    rng, kept_sampler = np.random.default_rng(0), Sampler(STOPS)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5, "presence_penalty": 1.0}]
    for step, rows in enumerate([3, 9, 1, 4, 9, 2]):
        logits = random_logits(1.5, seed=step, rows=rows, vocab=WIDE)
        picked = [kinds[kind] for kind in rng.integers(0, len(kinds), rows)]
        kept, new = ([make_sequence(seed=row, **kind) for row, kind in enumerate(picked)] for _ in range(2))
        assert kept_sampler.sample(logits, kept) == sample(logits, new, STOPS)


def test_a_seeded_request_is_the_same_alone_and_in_company(
    tiny_base: Base, make_function: Callable[..., PersonaFunction], prompt_of: Callable[..., tuple[int, ...]]
) -> None:
    """Through the engine, in float32; the others come and go while it runs."""
    settings = EngineSettings(max_num_seqs=8, max_model_len=256)
    sampling = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)
    seeded = Request("seeded", prompt_of(1), make_function(tiny_base, 1), sampling)
    others = [
        Request(
            f"other-{i}",
            prompt_of(10 + i, 5 + 9 * i),
            make_function(tiny_base, i % 3),
            SamplingParams(max_tokens=4 + 5 * i, temperature=[0.0, 1.0, 0.7][i % 3], top_k=[0, 0, 20][i % 3]),
        )
        for i in range(7)
    ]
    with Engine(tiny_base, settings) as engine:
        alone = engine.generate_all([seeded])["seeded"]
    with Engine(tiny_base, settings) as engine:
        together = engine.generate_all([*others[:4], seeded, *others[4:]])["seeded"]
    assert len(set(alone.token_ids)) > 5  # it did draw
    assert together == alone


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_stay_as_they_are(dtype: torch.dtype) -> None:
    logits = random_logits(1.0, rows=2).to(dtype)
    raw = logits.clone()
    edited = make_sequence(prompt=(1, 2, 3), repetition_penalty=2.0, min_tokens=4, logprobs=2)
    sample(logits, [edited, make_sequence(top_p=0.9)], STOPS)
    assert torch.equal(logits, raw)


def test_penalties_of_many_rows_are_those_of_each_alone() -> None:
    """Against a plain loop, over the steps of one sampler."""
    logits = random_logits(2.0, rows=6)
    rng = np.random.default_rng(3)
    sequences = [
        make_sequence(
            prompt=tuple(rng.integers(0, 50, 1 + 7 * row).tolist()),
            output=tuple(rng.integers(0, 50, 5 * row).tolist()),
            temperature=0.0,
            repetition_penalty=[1.0, 1.3, 0.7][row % 3],
            presence_penalty=[0.0, 1.5][row % 2],
            frequency_penalty=[0.4, -0.2, 0.0][row % 3],
        )
        for row in range(6)
    ]
    sampler = Sampler(STOPS)
    for _ in range(4):
        expected = [int(plain_penalties(row, one).argmax()) for row, one in zip(logits, sequences, strict=True)]
        sampled = sampler.sample(logits, sequences)
        assert [one.token_id for one in sampled] == expected
        for row, sequence in enumerate(sequences):
            sequence.tokens += [expected[row], *rng.integers(0, 50, row % 3).tolist()]
        sequences = sequences[1:] + sequences[:1]
        logits = logits.roll(-1, dims=0)


def plain_penalties(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """The definition, token by token."""
    p, scores = sequence.sampling, logits.clone()
    for token in set(sequence.tokens):
        value = scores[token]
        scores[token] = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
    output = sequence.tokens[sequence.num_prompt :]
    for token in set(output):
        scores[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    return scores


def test_a_request_that_ends_leaves_no_history_to_the_next() -> None:
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, 10], logits[0, 11] = 2.0, 1.0
    sampler = Sampler(STOPS)
    for _ in range(3):  # each may be made at the address of the one before
        first = make_sequence(output=(10,), temperature=0.0, presence_penalty=1.5)
        assert sampler.sample(logits, [first])[0].token_id == 11
        del first
        second = make_sequence(output=(11,), temperature=0.0, presence_penalty=1.5)
        assert sampler.sample(logits, [second])[0].token_id == 10
        del second


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


def test_each_row_reports_as_much_as_it_asked_for() -> None:
    logits = random_logits(2.0, rows=4).bfloat16()
    asked = [None, 2, 5, 0]
    sampled = sample(logits, [make_sequence(seed=row, logprobs=num) for row, num in enumerate(asked)], STOPS)
    raw = torch.log_softmax(logits.float(), -1)
    for row, num in enumerate(asked):
        if num is None:
            assert sampled[row].logprob is None
            continue
        assert sampled[row].logprob == pytest.approx(float(raw[row, sampled[row].token_id]), abs=1e-5)
        assert [p for _, p in sampled[row].top_logprobs] == pytest.approx(raw[row].topk(num).values.tolist(), abs=1e-5)
        assert all(raw[row, token] == pytest.approx(p, abs=1e-5) for token, p in sampled[row].top_logprobs)


def test_a_vocabulary_smaller_than_the_prefilter() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    assert {pick(logits, seed=seed) for seed in range(60)} == {0, 1, 2}
    assert pick(logits, top_p=0.1, seed=1) == 2
