"""All ways through the engine compute one function: the eager reference's, within rounding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base, runner
from masquerade_engine.attention import Span, TorchAttention
from masquerade_engine.reference import reference_logits
from masquerade_engine.runner import Runner
from masquerade_engine.seams import persona_ffns
from masquerade_engine.sequence import Batch
from masquerade_kernels import lora_factors
from masquerade_kernels.rows import TorchRows
from masquerade_masks import Attached, Mask
from masquerade_masks.attached import PARTS, full_name

TOLERANCE = 1e-4  # on a logit, float32
DENSE_ONLY = EngineSettings(max_num_seqs=8, max_model_len=256, pack_cache_bytes=0)

Function = Callable[..., PersonaFunction]
Forced = Callable[..., torch.Tensor]
Prompt = Callable[..., tuple[int, ...]]

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"intermediate_size": 97, "num_key_value_heads": 1}),
    ("mistral", {"intermediate_size": 61, "sliding_window": 9}),
    ("qwen2", {"intermediate_size": 130, "num_key_value_heads": 4}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    ("qwen3", {"intermediate_size": 33, "head_dim": 16}),
]


def expected_logits(base: Base, function: PersonaFunction, tokens: tuple[int, ...]) -> torch.Tensor:
    """`[num_tokens, vocab]` of the eager reference."""
    subnetwork, model, ids = function.subnetwork, base.build_model(), torch.tensor([tokens])
    if subnetwork is None:
        return reference_logits(model, ids)[0]
    coefficients, rows, attached = torch.from_numpy(subnetwork.coefficients()), subnetwork.biases(), subnetwork.weights
    biases = None if rows is None else torch.from_numpy(rows)
    lora = None
    if attached is not None and attached.kind == "lora":
        lora = [lora_factors(attached, layer) for layer in range(base.shape.num_layers)]
    elif attached is not None:
        replace_weights(model, subnetwork.mask, attached)
    return reference_logits(model, ids, coefficients, biases, lora)[0]


@torch.no_grad()
def replace_weights(model: torch.nn.Module, mask: Mask, own: Attached) -> None:
    """The kept rows of gate and up, and columns of down, become a persona's own."""
    for ffn in persona_ffns(model):
        kept = torch.from_numpy(mask.layer(ffn.layer))
        gate, up, down = (torch.from_numpy(own.float32(full_name(ffn.layer, part))) for part in PARTS)
        ffn.gate_proj.get_parameter("weight")[kept] = gate
        ffn.up_proj.get_parameter("weight")[kept] = up
        ffn.down_proj.get_parameter("weight")[:, kept] = down


def wait_until_compact(engine: Engine, function: PersonaFunction) -> None:
    engine.install(function)
    wait_until(lambda: engine.residency(function.digest) == "compact")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_dense_compact_and_reference_agree(
    model_type: str,
    config: dict[str, Any],
    tmp_path: Path,
    make_tiny_base: Callable[..., Path],
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    made = make_tiny_base(tmp_path / "base", model_type, **config)
    base = load_base(str(made), cache_dir=tmp_path / "cache", dtype="fp32")
    function = make_function(base, 1, gain=True, bias=True)
    tokens = prompt_of(2, 40)
    stops = [11, 12, 13, 30, *range(31, 41)]
    expected = expected_logits(base, function, tokens)[[stop - 1 for stop in stops]]
    with Engine(base, DENSE_ONLY) as engine:
        dense = forced_logits(engine, function, tokens, stops, slot=3)
        unpruned = forced_logits(engine, PersonaFunction("base", "town"), tokens, [40])
    assert (dense - expected).abs().max() < TOLERANCE
    assert (unpruned[0] - expected_logits(base, PersonaFunction("base", "town"), tokens)[-1]).abs().max() < TOLERANCE
    assert (unpruned[0] - expected[-1]).abs().max() > 0.1
    with Engine(base, EngineSettings(max_num_seqs=4, max_model_len=128)) as engine:
        wait_until_compact(engine, function)
        compact = forced_logits(engine, function, tokens, stops)
    assert (compact - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_low_rank_updates_agree_in_every_pack(
    model_type: str,
    config: dict[str, Any],
    tmp_path: Path,
    make_tiny_base: Callable[..., Path],
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    made = make_tiny_base(tmp_path / "base", model_type, **config)
    base = load_base(str(made), cache_dir=tmp_path / "cache", dtype="fp32")
    function, other = make_function(base, 1, gain=True, bias=True, attached="lora"), make_function(base, 2)
    tokens, stops = prompt_of(2, 40), [11, 12, 30, *range(35, 41)]
    expected = expected_logits(base, function, tokens)[[stop - 1 for stop in stops]]
    plain = make_function(base, 1, gain=True, bias=True)
    assert (expected_logits(base, plain, tokens)[-1] - expected[-1]).abs().max() > 0.1
    found = {}
    with Engine(base, DENSE_ONLY) as engine:
        found["dense"] = forced_logits(engine, function, tokens, stops, slot=3)
    with Engine(base, EngineSettings(max_num_seqs=4, max_model_len=128)) as engine:
        wait_until_compact(engine, function)
        found["compact"] = forced_logits(engine, function, tokens, stops)
        engine.install(other)
        wait_until(lambda: len(engine.runner.packs.resident.packs) == 3)
        only_the_cast_is_resident(engine, "town")
        found["cast"] = forced_logits(engine, function, tokens, stops)
    for logits in found.values():
        assert (logits - expected).abs().max() < TOLERANCE


def only_the_cast_is_resident(engine: Engine, cast: str) -> None:
    packs = engine.runner.packs
    packs._resident = packs.resident.without([key for key in packs.resident.packs if key != f"cast:{cast}"])
    assert len(packs.resident.packs) == 1


@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_own_weights_are_the_reference_with_its_weights_replaced(
    model_type: str,
    config: dict[str, Any],
    tmp_path: Path,
    make_tiny_base: Callable[..., Path],
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    made = make_tiny_base(tmp_path / "base", model_type, **config)
    base = load_base(str(made), cache_dir=tmp_path / "cache", dtype="fp32")
    function = make_function(base, 1, gain=True, bias=True, attached="full")
    tokens, stops = prompt_of(2, 40), [11, 12, 30, *range(35, 41)]
    expected = expected_logits(base, function, tokens)[[stop - 1 for stop in stops]]
    with Engine(base, EngineSettings(max_num_seqs=4, max_model_len=128)) as engine:
        wait_until_compact(engine, function)
        found = forced_logits(engine, function, tokens, stops)
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("pack_cache_bytes", [16 << 20, 80_000])  # all packs, and hardly more than the own weights'
def test_attached_weights_of_every_kind_in_one_batch(
    pack_cache_bytes: int,
    tiny_base: Base,
    make_function: Function,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["lora", "full", None, "lora"]
    functions = [
        make_function(tiny_base, i, gain=i % 2 == 0, bias=i == 1, attached=kind) for i, kind in enumerate(kinds)
    ]
    functions.append(PersonaFunction("base", "town"))
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    seeded = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    settings = EngineSettings(max_num_seqs=10, max_model_len=256, prefill_chunk=64, pack_cache_bytes=pack_cache_bytes)
    with Engine(tiny_base, settings) as engine:
        recorded = record_logits(engine, monkeypatch)
        engine.generate_all(
            Request(str(i), prompt_of(i, 5 + 9 * i), functions[i % 5], greedy if i < 5 else seeded) for i in range(10)
        )
    compared = [(name, *step[name]) for step in recorded for name in step]
    assert len(compared) == 80
    for name, tokens, row in compared:
        assert (row - expected_logits(tiny_base, functions[int(name) % 5], tokens)[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("model_type", "config"), FAMILIES)
def test_plain_torch_which_other_devices_run_agrees_as_well(
    model_type: str,
    config: dict[str, Any],
    tmp_path: Path,
    make_tiny_base: Callable[..., Path],
    make_function: Function,
    prompt_of: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in chunks and ragged decoding of three personas, through the attention and the rows of no device."""

    def attention(self: Runner, spans: Sequence[Span]) -> TorchAttention:
        return TorchAttention(self._kv, self._decoder.rotary, spans, self._device)

    monkeypatch.setattr(runner, "row_ops", lambda device, dtype: TorchRows())
    monkeypatch.setattr(Runner, "_attention", attention)
    base = load_base(str(make_tiny_base(tmp_path / "base", model_type, **config)), cache_dir=tmp_path, dtype="fp32")
    kinds = [None, "lora", None]
    functions = [make_function(base, i, gain=True, bias=i == 1, attached=kind) for i, kind in enumerate(kinds)]
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    settings = EngineSettings(max_num_seqs=4, max_model_len=128, prefill_chunk=24, pack_cache_bytes=0)
    with Engine(base, settings) as engine:
        recorded = record_logits(engine, monkeypatch)
        engine.generate_all(
            Request(str(i), prompt_of(i, 5 + 17 * i), function, greedy) for i, function in enumerate(functions)
        )
    compared = [(name, *step[name]) for step in recorded for name in step]
    assert len(compared) == 18
    for name, tokens, row in compared:
        assert (row - expected_logits(base, functions[int(name)], tokens)[-1]).abs().max() < TOLERANCE


def test_a_long_chunk_on_its_own_pack_beside_decoding_ones(
    tiny_base: Base, make_function: Function, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step: decoding rows of two personas and the base on the dense pack, a long prompt on its compact one."""
    first, second = make_function(tiny_base, 1, gain=True), make_function(tiny_base, 2)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with Engine(tiny_base, EngineSettings(max_num_seqs=4, max_model_len=256)) as engine:
        wait_until_compact(engine, second)
        recorded = record_logits(engine, monkeypatch)
        for name, function in (("a", first), ("b", PersonaFunction("base", "town"))):
            engine.add(Request(name, prompt_of(1), function, greedy))
        engine.step()
        engine.add(Request("c", prompt_of(3, 100), second, greedy))
        engine.step()
        logits = recorded[-1]
    for name, function, prompt in (("c", second, prompt_of(3, 100)),):
        assert (logits[name][1] - expected_logits(tiny_base, function, prompt)[-1]).abs().max() < TOLERANCE
    for name, function in (("a", first), ("b", PersonaFunction("base", "town"))):
        tokens, row = logits[name]
        assert (row - expected_logits(tiny_base, function, tokens)[-1]).abs().max() < TOLERANCE


def test_eight_personas_in_one_batch_give_what_each_gives_alone(
    tiny_base: Base, make_function: Function, forced_logits: Forced, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = [make_function(tiny_base, i, gain=i % 2 == 0, bias=i % 3 == 0, sparsity=0.25) for i in range(7)]
    functions.append(PersonaFunction("base", "town"))
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [prompt_of(i, 5 + 9 * i) for i in range(8)]
    with Engine(tiny_base, DENSE_ONLY) as engine:
        recorded = record_logits(engine, monkeypatch)
        results = engine.generate_all(Request(str(i), prompts[i], functions[i], greedy) for i in range(8))
        monkeypatch.undo()
        compared = 0
        for i, function in enumerate(functions):
            tokens = prompts[i] + results[str(i)].token_ids
            mixed = torch.stack([step[str(i)][1] for step in recorded if str(i) in step])
            alone = forced_logits(engine, function, tokens, range(len(prompts[i]), len(tokens)))
            delta = (mixed - alone).abs().max()
            assert delta < TOLERANCE
            top = alone.topk(2).values
            decided = top[:, 0] - top[:, 1] > 2 * delta
            given = torch.tensor(results[str(i)].token_ids)
            assert torch.equal(alone.argmax(-1)[decided], given[decided])
            compared += int(decided.sum())
    assert compared > 80  # of 96: the rule left something to compare


def record_logits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, tuple[tuple[int, ...], torch.Tensor]]]:
    """From now on, each step's logits by request id, with the tokens that they follow."""
    recorded: list[dict[str, tuple[tuple[int, ...], torch.Tensor]]] = []
    final_states = engine.runner.final_states

    def record(batch: Batch) -> torch.Tensor:
        states = final_states(batch)
        rows = engine.runner._decoder.logits(states)
        recorded.append({s.request.id: (tuple(s.tokens), row) for s, row in zip(batch.sampling, rows, strict=True)})
        return states

    monkeypatch.setattr(engine.runner, "final_states", record)
    return recorded


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_a_prompt_in_chunks_is_the_whole_prompt(
    chunk: int, tiny_base: Base, make_function: Function, forced_logits: Forced, prompt_of: Prompt
) -> None:
    function, tokens = make_function(tiny_base, 1), prompt_of(4, 40)
    with Engine(tiny_base, DENSE_ONLY) as engine:
        found = forced_logits(engine, function, tokens, [*range(chunk, 40, chunk), 40])[-1]
    assert (found - expected_logits(tiny_base, function, tokens)[-1]).abs().max() < TOLERANCE


def test_many_decoding_rows_of_very_different_lengths(
    tiny_base: Base, make_function: Function, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long enough for batched products, with holes where requests have ended."""
    functions = [make_function(tiny_base, i) for i in range(3)]
    lengths = [480, 3, 200, 490, 40, 41, 42, 400]
    with Engine(tiny_base, EngineSettings(max_num_seqs=8, max_model_len=512, pack_cache_bytes=0)) as engine:
        recorded = record_logits(engine, monkeypatch)
        engine.generate_all(
            Request(
                str(i),
                prompt_of(i, n),
                functions[i % 3],
                SamplingParams(max_tokens=1 + i, temperature=0.0, ignore_eos=True),
            )
            for i, n in enumerate(lengths)
        )
    for step in recorded[-8:]:
        for name, (tokens, row) in step.items():
            expected = expected_logits(tiny_base, functions[int(name) % 3], tokens)[-1]
            assert (row - expected).abs().max() < TOLERANCE


def test_bf16_runs_and_follows_float32(
    tiny_base: Base,
    tiny_base_dir: Path,
    tmp_path: Path,
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path, dtype="bf16")
    function, tokens = make_function(base, 1, gain=True), prompt_of(4, 300)
    stops = [*range(290, 301)]
    expected = expected_logits(tiny_base, function, tokens)[[stop - 1 for stop in stops]]
    with Engine(base, EngineSettings(max_num_seqs=2)) as engine:
        found = forced_logits(engine, function, tokens, stops).float()
        wait_until_compact(engine, function)
        compact = forced_logits(engine, function, tokens, stops).float()
    for logits in (found, compact):
        # Rounding of 2^-9 through 3 layers: the direction of a logit row keeps 4 digits.
        assert torch.cosine_similarity(logits, expected).min() > 0.999
