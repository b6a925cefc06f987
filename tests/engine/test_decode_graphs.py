"""Decoding steps that replay: what a graph computes is what the eager step computes, for whoever is in the slots.

On the CPU a stand-in for the capture keeps the step and runs it again; on a GPU the same tests capture for real.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine import (
    Base,
    Engine,
    EngineSettings,
    PersonaFunction,
    Request,
    SamplingParams,
    decode_graphs,
    load_base,
    runner,
)
from masquerade_engine.decode_graphs import Capture, DecodeGraphs, Step, graph_capture, key_buckets, row_buckets
from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.sequence import Batch, Chunk
from masquerade_engine.sequence import Sequence as EngineSequence
from masquerade_kernels import RowCosts

TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5  # on a logit of a few units, float32
BY_SHARE = RowCosts(((1, 100.0), (2, 100.0)))  # the smallest pack is chosen, whatever a tiny one takes on a GPU
SETTINGS = EngineSettings(max_num_seqs=12, max_model_len=128, pack_cache_bytes=0)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

Function = Callable[..., PersonaFunction]
Forced = Callable[..., torch.Tensor]
Prompt = Callable[..., tuple[int, ...]]
MakeEngine = Callable[..., Engine]

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 16}),
]


class Counted:
    """A capture that keeps the step, or does what another does, and counts."""

    def __init__(self, inner: Capture | None) -> None:
        self._inner = inner
        self.num_captured = 0
        self.num_replayed = 0

    def __call__(self, step: Step) -> Step:
        again = step if self._inner is None else self._inner(step)
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            again()

        return replay


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def base(device: torch.device, tiny_base_dir: Path, tmp_path: Path) -> Base:
    return load_base(str(tiny_base_dir), cache_dir=tmp_path, dtype="fp32", device=str(device))


@pytest.fixture
def capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Engines made from now on capture with this; numbers of keys are rounded up to 16, 32, 64, 128."""
    made = Counted(graph_capture(device))
    monkeypatch.setattr(runner, "graph_capture", lambda _: made)
    monkeypatch.setattr(decode_graphs, "_LEAST_KEYS", 16)
    return made


@pytest.fixture
def make_engine(base: Base, capture: Counted) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(**changes: Any) -> Engine:
        engines.append(Engine(base, replace(SETTINGS, **changes)))
        engines[-1].runner._costs = BY_SHARE
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def graphs_of(engine: Engine) -> DecodeGraphs:
    assert engine.runner._graphs is not None
    return engine.runner._graphs


def sequence(function: PersonaFunction, tokens: Sequence[int], slot: int) -> EngineSequence:
    request = Request(f"{slot}", tuple(tokens), function, GREEDY)
    return EngineSequence(request, Detokenizer(lambda ids: ""), slot=slot)


def prefill(engine: Engine, sequences: Sequence[EngineSequence]) -> None:
    """All but the last token."""
    chunks = (Chunk(one, 0, len(one.tokens) - 1, False) for one in sequences)
    engine.runner.logits(Batch(tuple(chunk for chunk in chunks if chunk.num_tokens)))


def decode(engine: Engine, sequences: Sequence[EngineSequence]) -> torch.Tensor:
    return engine.runner.logits(Batch(tuple(Chunk(one, len(one.tokens) - 1, 1, True) for one in sequences)))


def all_kv(engine: Engine) -> torch.Tensor:
    """`[layers, 2, slots, kv_heads, max_len, head_dim]`."""
    return engine.runner._kv._slots


def test_rows_and_keys_are_rounded_up_to_few_numbers() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(12) == [1, 2, 4, 8, 12]
    assert row_buckets(32) == [1, 2, 4, 8, 16, 24, 32]
    assert key_buckets(100) == [100]
    assert key_buckets(2048) == [256, 512, 1024, 2048]
    assert key_buckets(3000) == [256, 512, 1024, 2048, 3000]


@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_a_replay_is_the_eager_step_and_leaves_all_other_keys_and_values_alone(
    model_type: str,
    config: dict[str, Any],
    device: torch.device,
    capture: Counted,
    make_tiny_base: Callable[..., Path],
    make_function: Function,
    prompt_of: Prompt,
    tmp_path: Path,
) -> None:
    """Slots 0, 3 and 6 of 12, so 8 rows of which 5 are nobody's; the longest of the three sees 41 of 64 keys."""
    directory = str(make_tiny_base(tmp_path / "base", model_type, **config))
    base = load_base(directory, cache_dir=tmp_path, dtype="fp32", device=str(device))
    functions = [make_function(base, 1, gain=True), make_function(base, 2, bias=True), PersonaFunction("base", "town")]
    sequences = [
        sequence(function, prompt_of(slot, length), slot)
        for function, slot, length in zip(functions, (6, 0, 3), (41, 1, 18), strict=True)
    ]
    with Engine(base, SETTINGS) as engine:
        all_kv(engine).normal_()
        prefill(engine, sequences)
        before = all_kv(engine).clone()
        eager = decode(engine, sequences)
        written = all_kv(engine).clone()
        all_kv(engine).copy_(before)
        replays = [decode(engine, sequences) for _ in range(2)]
        assert (capture.num_captured, capture.num_replayed) == (1, 2)
        for found in replays:
            assert (found - eager).abs().max() < TOLERANCE
        changed = (written != before).any(dim=-1).any(dim=3).any(dim=1).any(dim=0)  # [slots, max_len]
        assert changed.nonzero().tolist() == [[0, 0], [3, 17], [6, 40]]
        assert torch.equal(all_kv(engine)[before == written], before[before == written])
        assert (all_kv(engine) - written).abs().max() < TOLERANCE


@pytest.mark.parametrize("pack_cache_bytes", [0, 16 << 20])
def test_whole_conversations_are_what_each_is_alone(
    pack_cache_bytes: int,
    base: Base,
    make_engine: MakeEngine,
    capture: Counted,
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eleven of four personas and the base, who come and go; slots fall free, and are taken again."""
    functions = [make_function(base, seed, gain=seed == 1, bias=seed == 2) for seed in range(4)]
    functions.append(PersonaFunction("base", "town"))
    engine = make_engine(max_num_seqs=7, pack_cache_bytes=pack_cache_bytes)
    final_states, recorded = engine.runner.final_states, []

    def record(batch: Batch) -> torch.Tensor:
        states = final_states(batch)
        rows = engine.runner._decoder.logits(states)
        recorded.extend((s.request.id, tuple(s.tokens), row) for s, row in zip(batch.sampling, rows, strict=True))
        return states

    monkeypatch.setattr(engine.runner, "final_states", record)
    engine.generate_all(
        Request(str(i), prompt_of(i, 4 + 7 * i), functions[i % 5], replace(GREEDY, max_tokens=30 - 2 * i))
        for i in range(11)
    )
    assert len(recorded) == sum(30 - 2 * i for i in range(11))
    assert capture.num_replayed > 5
    alone = make_engine(enforce_eager=True)
    for name, tokens, row in recorded:
        expected = forced_logits(alone, functions[int(name) % 5], tokens, [len(tokens)])[0]
        assert (row - expected).abs().max() < TOLERANCE


def test_one_graph_serves_whoever_is_in_the_slots(
    base: Base, make_engine: MakeEngine, capture: Counted, make_function: Function, prompt_of: Prompt
) -> None:
    """Personas, tokens, lengths and slots of a step are read from tensors when it is replayed."""
    engine, eager = make_engine(), make_engine(enforce_eager=True)
    one, other = make_function(base, 1, gain=True), make_function(base, 2, gain=True)
    steps = [
        [sequence(one, prompt_of(1, 20), 0), sequence(other, prompt_of(2, 25), 1)],
        [sequence(other, prompt_of(3, 20), 0), sequence(one, prompt_of(4, 25), 1)],
        [sequence(other, prompt_of(5, 32), 0), sequence(other, prompt_of(6, 17), 1)],
        [sequence(one, prompt_of(7, 30), 1)],
    ]
    decode(engine, steps[0])  # wanted once
    for sequences in steps:
        for made in (engine, eager):
            prefill(made, sequences)
        assert (decode(engine, sequences) - decode(eager, sequences)).abs().max() < TOLERANCE
    assert (capture.num_captured, capture.num_replayed) == (1, 4)


def test_biases_that_come_later_are_no_part_of_an_earlier_graph(
    base: Base, make_engine: MakeEngine, capture: Counted, make_function: Function, prompt_of: Prompt
) -> None:
    engine, eager = make_engine(), make_engine(enforce_eager=True)
    for function in (make_function(base, 1), make_function(base, 2, bias=True), PersonaFunction("base", "town")):
        sequences = [sequence(function, prompt_of(1, 20), 0)]
        for made in (engine, eager):
            prefill(made, sequences)
        expected = decode(eager, sequences)
        for _ in range(3):
            assert (decode(engine, sequences) - expected).abs().max() < TOLERANCE
    assert (capture.num_captured, capture.num_replayed) == (3, 6)


def test_a_graph_goes_with_its_pack(
    base: Base, make_engine: MakeEngine, capture: Counted, make_function: Function, prompt_of: Prompt
) -> None:
    """A new version is published while graphs of the old one exist: nobody holds its pack from the next step on."""
    engine, eager = make_engine(pack_cache_bytes=16 << 20), make_engine(enforce_eager=True)
    old, new = make_function(base, 1, gain=True), make_function(base, 2, gain=True)
    packs = engine.runner.packs

    def check(function: PersonaFunction) -> None:
        sequences = [sequence(function, prompt_of(1, 20), 0)]
        for made in (engine, eager):
            prefill(made, sequences)
        assert (decode(engine, sequences) - decode(eager, sequences)).abs().max() < TOLERANCE

    def publish(function: PersonaFunction) -> None:
        engine.install(function)
        deadline = time.monotonic() + 20
        while engine.residency(function.digest) != "compact":
            assert time.monotonic() < deadline
            time.sleep(0.005)

    publish(old)
    for _ in range(3):
        check(old)
    held = weakref.ref(packs.resident.packs[old.digest].layers[0].coefficients)
    assert capture.num_captured == 1
    engine.forget(old.digest)
    publish(new)
    for _ in range(3):
        check(new)
    assert held() is None
    assert capture.num_captured == 2
    for _ in range(3):
        check(old)  # what runs on goes on densely
    assert capture.num_captured == 3


def test_the_graphs_used_longest_ago_go(
    base: Base, make_engine: MakeEngine, capture: Counted, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_MAX_GRAPHS", 2)
    engine, function = make_engine(), PersonaFunction("base", "town")

    def captured(length: int) -> int:
        """How many captures two more steps over so many keys take."""
        before = capture.num_captured
        for _ in range(2):
            decode(engine, [sequence(function, prompt_of(1, length), 0)])
        return capture.num_captured - before

    assert [captured(length) for length in (10, 20)] == [1, 1]
    assert captured(10) == 0
    assert captured(40) == 1  # 20 goes
    assert captured(10) == 0
    assert captured(20) == 1
    assert len(graphs_of(engine)._graphs) == 2


def test_rows_far_apart_are_not_replayed(
    base: Base, make_engine: MakeEngine, capture: Counted, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_MAX_PADDING", 128)
    engine, function = make_engine(), PersonaFunction("base", "town")
    apart = [sequence(function, prompt_of(slot, 20), slot) for slot in (0, 10)]  # 12 rows of 32 keys, for 40
    together = [sequence(function, prompt_of(slot, 20), slot) for slot in (0, 1)]  # 2 of 32
    for sequences, expected in ((apart, 0), (together, 1)):
        prefill(engine, sequences)
        for _ in range(3):
            decode(engine, sequences)
        assert capture.num_captured == expected


def test_prompts_own_weights_and_low_rank_updates_run_eagerly(
    base: Base, make_engine: MakeEngine, capture: Counted, make_function: Function, prompt_of: Prompt
) -> None:
    engine = make_engine(pack_cache_bytes=16 << 20)
    own, updated = make_function(base, 1, attached="full"), make_function(base, 2, attached="lora")
    for function in (own, updated):
        engine.generate_all([Request(function.digest, prompt_of(1), function, GREEDY)])
    for _ in range(3):
        engine.runner.logits(Batch((Chunk(sequence(PersonaFunction("b", "town"), prompt_of(1), 0), 0, 5, True),)))
    assert capture.num_captured == 0
    assert not graphs_of(engine)._graphs


def test_a_step_of_two_packs_runs_eagerly(
    base: Base,
    make_engine: MakeEngine,
    capture: Counted,
    make_function: Function,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(pack_cache_bytes=16 << 20)
    monkeypatch.setattr(engine.runner, "_costs", RowCosts(((1, 1.0), (2, 2.0))))
    function = make_function(base, 1)
    engine.install(function)
    while engine.residency(function.digest) != "compact":
        time.sleep(0.005)
    for _ in range(3):
        decode(
            engine,
            [sequence(function, prompt_of(1), 0), sequence(PersonaFunction("base", "town"), prompt_of(1), 1)],
        )
    assert len(engine.runner._plan.segments) == 2
    assert capture.num_captured == 0


def test_a_capture_that_fails_leaves_the_engine_on_eager_steps(
    base: Base,
    make_engine: MakeEngine,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries: list[Step] = []

    def fail(step: Step) -> Step:
        tries.append(step)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(runner, "graph_capture", lambda _: fail)
    engine, eager, function = make_engine(), make_engine(enforce_eager=True), PersonaFunction("base", "town")
    results = [
        made.generate_all([Request("a", prompt_of(1), function, GREEDY)])["a"].token_ids for made in (engine, eager)
    ]
    assert results[0] == results[1]
    assert len(tries) == 1
    assert "no CUDA graphs from now on" in caplog.text


def test_graphs_are_of_cuda_and_can_be_turned_off(base: Base, make_engine: MakeEngine) -> None:
    eager = make_engine(enforce_eager=True)
    assert eager.runner._graphs is None
    assert len(eager.runner._table.scales(0)) == 8
    assert len(make_engine().runner._table.scales(0)) == 13  # it may not move
    assert graph_capture(torch.device("cpu")) is None
