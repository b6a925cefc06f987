"""The engine on gathered packs: on a GPU, or on the CPU in triton's interpreter.

Run it by itself as `TRITON_INTERPRET=1 pytest tests/engine/test_gathered_engine.py`; test_interpreter.py does, in a
process of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base, runner
from masquerade_engine.decode_graphs import graph_capture
from masquerade_engine.reference import reference_logits
from masquerade_engine.sequence import Batch
from masquerade_kernels import Pack, RowCosts, can_gather, lora_factors, row_costs
from masquerade_kernels.gathered import GatheredLayerPack

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
if not can_gather(DEVICE):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it", allow_module_level=True)

TOLERANCE = 1e-4  # on a logit, float32
BY_SHARE = RowCosts(((1, 100.0), (2, 100.0)))  # the smallest cover is chosen, however long the interpreter takes
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

Function = Callable[..., PersonaFunction]
Forced = Callable[..., torch.Tensor]
Prompt = Callable[..., tuple[int, ...]]


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tiny_base_dir), cache_dir=tmp_path_factory.mktemp("cache"), dtype="fp32", device=str(DEVICE))


@pytest.fixture
def engine(base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Captures decoding steps, where there is no GPU by keeping them."""
    monkeypatch.setattr(runner, "measure_row_costs", lambda *_: BY_SHARE)
    monkeypatch.setattr(runner, "graph_capture", lambda device: graph_capture(device) or (lambda step: step))
    with Engine(base, EngineSettings(max_num_seqs=6, max_model_len=128)) as made:
        yield made


@pytest.fixture
def personas(base: Base, make_function: Function) -> list[PersonaFunction]:
    """One plain, one with gains, one with biases too."""
    return [make_function(base, seed, sparsity=0.6, gain=seed > 0, bias=seed == 2) for seed in range(3)]


def expected_logits(base: Base, function: PersonaFunction, tokens: tuple[int, ...]) -> torch.Tensor:
    """`[num_tokens, vocab]` of the eager reference in float64."""
    model, ids, own = base.build_model(torch.float64), torch.tensor([tokens], device=DEVICE), function.subnetwork
    if own is None:
        return reference_logits(model, ids)[0]
    biases = own.biases()
    lora = None
    if own.weights is not None:
        lora = [lora_factors(own.weights, layer) for layer in range(base.shape.num_layers)]
    return reference_logits(
        model,
        ids,
        torch.from_numpy(own.coefficients()).to(DEVICE),
        None if biases is None else torch.from_numpy(biases).to(DEVICE),
        lora,
    )[0]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def packs_of(engine: Engine) -> list[Pack]:
    """The packs that the last step ran on."""
    return [segment.pack for segment in engine.runner._plan.segments]


def packs_replayed(engine: Engine) -> set[tuple[str, ...] | None]:
    """The members of the packs that graphs were captured on, since the packs changed; the dense one's stay."""
    graphs = engine.runner._graphs
    assert graphs is not None
    return {graph.pack.members for graph in graphs._graphs.values() if graph.replay is not None}


def test_compact_cast_and_dense_are_the_reference(
    engine: Engine,
    base: Base,
    personas: list[PersonaFunction],
    forced_logits: Forced,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for function in personas:
        engine.install(function)
    packs = engine.runner.packs
    wait_until(lambda: packs.residency(personas[2].digest) == "compact" and "cast:town" in packs.resident.packs)
    whole = packs.resident
    assert len(whole.packs) == 4
    assert all(isinstance(layer, GatheredLayerPack) for pack in whole.packs.values() for layer in pack.layers)
    assert packs.num_bytes == sum(pack.num_bytes for pack in whole.packs.values())
    cast_only = whole.without([function.digest for function in personas])
    nothing = whole.without(list(whole.packs))
    tokens, stops = prompt_of(2, 30), [11, 12, 28, 29, 30]
    for function in personas:
        expected = expected_logits(base, function, tokens)[[stop - 1 for stop in stops]]
        for resident, members in (
            (whole, (function.digest,)),
            (cast_only, whole.packs["cast:town"].members),
            (nothing, None),
        ):
            monkeypatch.setattr(packs, "_resident", resident)
            found = forced_logits(engine, function, tokens, stops)
            assert [pack.members for pack in packs_of(engine)] == [members]
            assert (found - expected).abs().max() < TOLERANCE
            assert members in packs_replayed(engine)
            assert packs_replayed(engine) <= {members, None}


def test_a_mixed_batch_gives_each_what_it_gives_alone(
    engine: Engine,
    base: Base,
    personas: list[PersonaFunction],
    forced_logits: Forced,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packs of one, and the dense one, in one step: the costs of a segment are nothing here."""
    functions = [*personas, PersonaFunction("base", "town")]
    for function in personas[:2]:
        engine.install(function)
    packs = engine.runner.packs
    wait_until(lambda: all(packs.residency(function.digest) == "compact" for function in personas[:2]))
    own = {function.digest: packs.resident.packs[function.digest] for function in personas[:2]}
    monkeypatch.setattr(packs, "want", lambda *_: None)
    monkeypatch.setattr(
        packs, "_resident", packs.resident.without([key for key in packs.resident.packs if key not in own])
    )
    monkeypatch.setattr(engine.runner, "_costs", RowCosts(((1, 1.0), (2, 2.0))))
    final_states, recorded, sizes = engine.runner.final_states, [], set()

    def record(batch: Batch) -> torch.Tensor:
        states = final_states(batch)
        rows = engine.runner._decoder.logits(states)
        sizes.add(len(packs_of(engine)))
        recorded.extend((s.request.id, tuple(s.tokens), row) for s, row in zip(batch.sampling, rows, strict=True))
        return states

    monkeypatch.setattr(engine.runner, "final_states", record)
    engine.generate_all(Request(str(i), prompt_of(i, 9 + 5 * i), functions[i % 4], GREEDY) for i in range(6))
    monkeypatch.setattr(engine.runner, "final_states", final_states)
    assert max(sizes) == 3
    assert len(recorded) == 24
    for name, tokens, row in recorded:
        alone = forced_logits(engine, functions[int(name) % 4], tokens, [len(tokens)])[0]
        assert (row - alone).abs().max() < TOLERANCE


def test_low_rank_updates_stay_on_the_dense_pack(
    engine: Engine,
    base: Base,
    personas: list[PersonaFunction],
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    updated = make_function(base, 7, sparsity=0.6, gain=True, attached="lora")
    for function in (updated, *personas):
        engine.install(function)
    wait_until(lambda: "cast:town" in engine.runner.packs.resident.packs)
    assert engine.residency(updated.digest) == "dense"
    tokens = prompt_of(3, 20)
    found = forced_logits(engine, updated, tokens, [18, 19, 20])
    assert [pack.members for pack in packs_of(engine)] == [None]
    assert (found - expected_logits(base, updated, tokens)[17:]).abs().max() < TOLERANCE


def test_own_weights_have_a_copied_pack(engine: Engine, base: Base, make_function: Function, prompt_of: Prompt) -> None:
    own = make_function(base, 8, attached="full")
    assert len(engine.generate_all([Request("own", prompt_of(1), own, GREEDY)])["own"].token_ids) == 4
    (pack,) = engine.runner.packs.resident.packs.values()
    assert not any(isinstance(layer, GatheredLayerPack) for layer in pack.layers)
    assert packs_of(engine) == [pack]


def test_gathered_packs_are_measured_beside_the_dense_one(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_costs, "_POINTS", (1, 16))
    monkeypatch.setattr(row_costs, "_REPEATS", 1)
    with Engine(base, EngineSettings(max_num_seqs=2, max_model_len=64)) as engine:
        costs = engine.runner._costs
    for points in (costs.points, costs.gathered):
        assert [rows for rows, _ in points] == [1, 16]
        assert 0 < points[0][1] <= points[1][1]
    assert costs.gathered != costs.points
