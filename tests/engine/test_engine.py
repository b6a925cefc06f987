from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams, TokenOutput
from masquerade_engine.kv_cache import KVGeometry
from masquerade_engine.prefix_index import BLOCK
from masquerade_engine.sequence import Sequence
from masquerade_kernels import CoefficientTable
from masquerade_masks import (
    BaseMismatch,
    ContextTooLong,
    FFNShape,
    Mask,
    MaskShapeError,
    QueueFull,
    SettingError,
    SubNetwork,
)

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

Function = Callable[..., PersonaFunction]
Prompt = Callable[..., tuple[int, ...]]


@pytest.fixture
def engine(tiny_base: Base) -> Iterator[Engine]:
    with Engine(tiny_base, EngineSettings(max_num_seqs=4, max_model_len=128, max_queue=2)) as made:
        yield made


def run_out(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def ids(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def test_hidden_states_come_with_the_tokens_of_who_asked_for_them(
    engine: Engine, tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    engine.add(Request("asked", prompt_of(1), base_function, GREEDY, return_hidden_states=True))
    engine.add(Request("other", prompt_of(2), base_function, GREEDY))
    outputs = run_out(engine)
    states = [output.hidden_state for output in outputs["asked"]]
    assert all(one is not None and one.dtype is tiny_base.dtype for one in states)
    logits = torch.stack([one for one in states if one is not None]) @ tiny_base.build_model().lm_head.weight.T
    assert logits.argmax(dim=-1).tolist() == ids(outputs["asked"])
    assert all(output.hidden_state is None for output in outputs["other"])


def test_generate_all_takes_more_than_the_queue_holds(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    results = engine.generate_all(Request(str(i), prompt_of(i), base_function, GREEDY) for i in range(20))
    assert set(results) == {str(i) for i in range(20)}
    assert all(len(result.token_ids) == 8 and result.finish_reason == "length" for result in results.values())


def test_the_text_is_that_of_the_tokens(engine: Engine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    sampling = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    result = engine.generate_all([Request("a", prompt_of(1), base_function, sampling)])["a"]
    whole = engine.base.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert result.text == whole.rstrip("\ufffd")


def test_a_prefix_that_is_cached_changes_nothing(tiny_base: Base, make_function: Function, prompt_of: Prompt) -> None:
    function = make_function(tiny_base, 1)
    prompt = prompt_of(1, 70)
    request = Request("a", prompt, function, GREEDY)
    with Engine(tiny_base, EngineSettings(max_num_seqs=2, prefix_cache_bytes=0)) as cold:
        expected = run_out_one(cold, request)
    with Engine(tiny_base, EngineSettings(max_num_seqs=2)) as engine:
        misses = run_out_one(engine, request)
        engine.add(Request("b", prompt_of(9, 30), function, GREEDY))  # takes the slot over
        run_out(engine)
        engine.add(request)
        hits = run_out(engine)["a"]
        assert hits[0].num_cached_tokens == 64
        assert ids(hits) == misses == expected


def run_out_one(engine: Engine, request: Request) -> list[int | None]:
    engine.add(request)
    return ids(run_out(engine)[request.id])


def test_a_conversation_reuses_its_earlier_turns(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    prompt = prompt_of(1, 30)
    first = engine.generate_all([Request("a", prompt, base_function, GREEDY)])["a"]
    follow_up = prompt + first.token_ids + prompt_of(2, 5)
    engine.add(Request("b", follow_up, base_function, GREEDY))
    outputs = run_out(engine)["b"]
    assert outputs[0].num_cached_tokens == 32


@pytest.mark.parametrize("changed", ["digest", "cast"])
def test_no_kv_is_shared_between_digests_or_casts(
    changed: str, engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    other = make_function(tiny_base, 2) if changed == "digest" else replace(function, cast="elsewhere")
    prompt = prompt_of(1, 60)
    alone = run_out_one(engine, Request("alone", prompt, other, GREEDY))
    with Engine(tiny_base, EngineSettings(max_num_seqs=4)) as fresh:
        run_out_one(fresh, Request("first", prompt, function, GREEDY))
        fresh.add(Request("second", prompt, other, GREEDY))
        outputs = run_out(fresh)["second"]
    assert outputs[0].num_cached_tokens == 0
    assert ids(outputs) == alone


def test_a_small_prefix_cache_under_pressure_never_gives_wrong_kv(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    functions = [make_function(tiny_base, i) for i in range(3)]
    requests = [Request(f"{i}", prompt_of(i % 3, 40) + prompt_of(i, 6), functions[i % 3], GREEDY) for i in range(24)]
    with Engine(tiny_base, EngineSettings(max_num_seqs=3, prefix_cache_bytes=0, pack_cache_bytes=0)) as engine:
        expected = engine.generate_all(requests)
    block = 2 * 3 * 2 * 8 * 4 * BLOCK  # bytes: K and V, layers, heads, head_dim, float32, tokens
    with Engine(tiny_base, EngineSettings(max_num_seqs=3, prefix_cache_bytes=7 * block, pack_cache_bytes=0)) as engine:
        found = engine.generate_all(requests)
        assert engine.stats().num_cached_tokens > 0
    assert found == expected


def test_cancelling_ends_a_request_before_the_next_step(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    for seed, name in enumerate("ab"):
        engine.add(Request(name, prompt_of(seed), base_function, GREEDY))
    engine.step()
    engine.cancel("a")
    engine.cancel("never heard of")
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("a", "cancelled"), ("b", None)]
    assert len(run_out(engine)["b"]) == 6


def test_the_queue_is_bounded(engine: Engine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    for i in range(6):
        engine.add(Request(str(i), prompt_of(i), base_function, GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Request("6", prompt_of(6), base_function, GREEDY))
    assert len(run_out(engine)) == 6


def test_what_cannot_be_computed_is_refused(
    engine: Engine, tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    with pytest.raises(ContextTooLong):
        engine.add(Request("a", prompt_of(1, 128), base_function, GREEDY))
    with pytest.raises(SettingError, match="prompt"):
        engine.add(Request("a", (), base_function, GREEDY))
    with pytest.raises(SettingError, match="token id outside"):
        engine.add(Request("a", (1, 10_000), base_function, GREEDY))
    mask = Mask.from_kept_indices([[0]] * 3, 96)
    stranger = SubNetwork("another base", tiny_base.shape, mask)
    with pytest.raises(BaseMismatch):
        engine.add(Request("a", (1,), PersonaFunction(stranger.digest, "town", stranger), GREEDY))
    misshapen = SubNetwork(tiny_base.fingerprint, FFNShape(3, 96, 31), mask)
    with pytest.raises(MaskShapeError):
        engine.install(PersonaFunction(misshapen.digest, "town", misshapen))
    assert not engine.has_work


def test_a_seeded_request_is_the_same_beside_any_neighbours(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    sampling = SamplingParams(max_tokens=12, seed=7, temperature=0.8, top_p=0.9, ignore_eos=True)
    request = Request("seeded", prompt_of(1), function, sampling)
    found = []
    for neighbours in (0, 3):
        with Engine(tiny_base, EngineSettings(max_num_seqs=4, pack_cache_bytes=0)) as engine:
            others = [
                Request(str(i), prompt_of(i + 5), make_function(tiny_base, i), SamplingParams(max_tokens=5 + i))
                for i in range(neighbours)
            ]
            found.append(engine.generate_all([*others, request])["seeded"].token_ids)
    assert found[0] == found[1]


def test_unseeded_requests_differ(engine: Engine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    results = engine.generate_all(Request(str(i), prompt_of(1), base_function, sampling) for i in range(3))
    assert len({result.token_ids for result in results.values()}) == 3


def test_a_stop_string_ends_the_text_across_tokens(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    sampling = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)
    text = engine.generate_all([Request("a", prompt_of(1), base_function, sampling)])["a"].text
    stop = text[10:13]  # one character a token
    cut = engine.generate_all([Request("b", prompt_of(1), base_function, replace(sampling, stop=(stop,)))])["b"]
    assert cut.finish_reason == "stop"
    assert cut.text == text[: text.index(stop)]


def test_logprobs_arrive_with_their_tokens(engine: Engine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    engine.add(Request("a", prompt_of(1), base_function, replace(GREEDY, logprobs=2)))
    for output in run_out(engine)["a"]:
        assert output.logprob == output.top_logprobs[0][1]
        assert output.token_id == output.top_logprobs[0][0]
        assert len(output.top_logprobs) == 2


def test_a_persona_moves_to_its_compact_pack_in_the_background(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    assert engine.residency(function.digest) == "none"
    dense = run_out_one(engine, Request("a", prompt_of(1), function, GREEDY))
    deadline = time.monotonic() + 10
    while engine.residency(function.digest) != "compact":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert run_out_one(engine, Request("b", prompt_of(2), function, GREEDY)) != []
    assert run_out_one(engine, Request("c", prompt_of(1), function, GREEDY)) == dense
    assert engine.stats().num_packs == 1


def test_without_memory_for_packs_everything_is_dense(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    with Engine(tiny_base, EngineSettings(max_num_seqs=1, pack_cache_bytes=0)) as engine:
        run_out_one(engine, Request("a", prompt_of(1), function, GREEDY))
        assert engine.residency(function.digest) == "dense"
        engine.forget(function.digest)
        assert engine.residency(function.digest) == "none"


def test_a_seeded_request_stays_on_the_dense_pack(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = make_function(tiny_base, 1)
    engine.install(function)
    while engine.residency(function.digest) != "compact":
        time.sleep(0.005)
    used = []
    planned = engine.runner._planned

    def record(chunks: Any) -> Any:
        ordered, segments = planned(chunks)
        used.extend(segment.pack.members for segment in segments)
        return ordered, segments

    monkeypatch.setattr(engine.runner, "_planned", record)
    run_out_one(engine, Request("a", prompt_of(1), function, replace(GREEDY, seed=1)))
    assert set(used) == {None}
    used.clear()
    run_out_one(engine, Request("b", prompt_of(1), function, GREEDY))
    assert set(used) == {(function.digest,)}


def test_a_request_that_fails_generate_all_leaves_nothing_behind(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    requests = [Request(str(i), prompt_of(i), base_function, GREEDY) for i in range(8)]
    with pytest.raises(ContextTooLong):
        engine.generate_all([*requests, Request("long", prompt_of(1, 128), base_function, GREEDY)])
    assert not engine.has_work
    assert len(engine.generate_all(requests)) == 8


def test_a_failed_step_ends_what_ran_and_nothing_else(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        engine.add(Request(str(i), prompt_of(i), base_function, GREEDY))
    engine.step()

    def fail(*_: Any) -> list[Any]:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.step()
    assert {(o.request_id, o.finish_reason) for o in engine.abandon()} == {(str(i), "error") for i in range(4)}
    assert list(run_out(engine)) == ["4"]


def test_a_step_of_base_rows_alone_reads_no_coefficients(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("coefficients were read")

    monkeypatch.setattr(CoefficientTable, "scales", refuse)
    run_out_one(engine, Request("a", prompt_of(1), base_function, GREEDY))


def test_figures_add_up(engine: Engine, base_function: PersonaFunction, prompt_of: Prompt) -> None:
    for i in range(2):
        run_out_one(engine, Request(str(i), prompt_of(1, 40), base_function, GREEDY))
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_prompt_tokens == 80
    assert stats.num_cached_tokens == 32
    assert stats.num_output_tokens == 16
    assert stats.num_steps == 16


def test_a_forgotten_function_gives_its_pack_back(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    before = run_out_one(engine, Request("a", prompt_of(1), function, GREEDY))
    while engine.residency(function.digest) != "compact":
        time.sleep(0.005)
    engine.forget(function.digest)
    assert engine.residency(function.digest) == "none"
    assert engine.stats().pack_bytes == 0
    assert run_out_one(engine, Request("b", prompt_of(1), function, GREEDY)) == before


def test_a_warmed_prompt_is_not_computed_again(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    persona = prompt_of(1, 50)
    alone = run_out_one(engine, Request("alone", persona + prompt_of(2, 9), function, GREEDY))
    with Engine(tiny_base, EngineSettings(max_num_seqs=4)) as fresh:
        warming = fresh.warm(function, persona, pin=True)
        (output,) = run_out(fresh)[warming]
        assert (output.finish_reason, output.token_id, output.num_prompt_tokens) == ("length", None, 50)
        assert fresh.residency(function.digest) != "none"
        assert fresh.stats().num_pinned_prefix_blocks == fresh.stats().num_prefix_blocks == 48 // BLOCK
        assert fresh.stats().num_prompt_tokens == 0
        fresh.add(Request("a", persona + prompt_of(2, 9), function, GREEDY))
        outputs = run_out(fresh)["a"]
        assert outputs[0].num_cached_tokens == 48
        assert ids(outputs) == alone
        again = fresh.warm(function, persona)
        assert run_out(fresh)[again][0].num_cached_tokens == 48
        fresh.forget(function.digest)
        fresh.step()
        assert fresh.stats().num_prefix_blocks == 0


def test_more_cannot_be_pinned_than_half_of_the_prefix_cache(
    tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    block = 2 * 3 * 2 * 8 * 4 * BLOCK  # bytes: K and V, layers, heads, head_dim, float32, tokens
    with Engine(tiny_base, EngineSettings(max_num_seqs=1, prefix_cache_bytes=7 * block)) as engine:
        assert engine.stats().max_prefix_blocks == 7
        engine.warm(base_function, prompt_of(1, 3 * BLOCK), pin=True)
        with pytest.raises(SettingError, match=f"{3 * BLOCK} tokens"):
            engine.warm(base_function, prompt_of(2, BLOCK), pin=True)


def test_requests_that_come_together_compute_their_persona_once(
    engine: Engine, tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    function = make_function(tiny_base, 1)
    requests = [Request(str(i), prompt_of(99, 64) + prompt_of(i, 10), function, GREEDY) for i in range(4)]
    alone = {request.id: run_out_one(engine, request) for request in requests}
    with Engine(tiny_base, EngineSettings(max_num_seqs=4)) as fresh:
        for request in requests:
            fresh.add(request)
        outputs = run_out(fresh)
        assert {name: ids(one) for name, one in outputs.items()} == alone
        assert fresh.stats().num_cached_tokens == 3 * 64


def test_a_deadline_ends_a_request_that_waits(
    tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    with Engine(tiny_base, EngineSettings(max_num_seqs=1)) as engine:
        engine.add(Request("a", prompt_of(1), base_function, GREEDY))
        engine.add(Request("b", prompt_of(2), base_function, GREEDY, deadline_s=1e-6))
        outputs = run_out(engine)
        assert [output.finish_reason for output in outputs["b"]] == ["deadline"]
        assert engine.stats().num_deadline == 1
        assert len(outputs["a"]) == 8


def test_the_memory_of_one_full_sequence_is_enough_on_the_cpu(
    tiny_base: Base, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    token = 2 * 3 * 2 * 8 * 4  # bytes: K and V, layers, heads, head_dim, float32
    with Engine(tiny_base, EngineSettings(max_num_seqs=8, max_model_len=100, kv_cache_bytes=100 * token)) as engine:
        assert engine.max_model_len == 100
        results = engine.generate_all(Request(str(i), prompt_of(i, 90), base_function, GREEDY) for i in range(3))
    assert [len(result.token_ids) for result in results.values()] == [8] * 3


def test_news_of_others_do_not_disturb_generate_all(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt
) -> None:
    engine.warm(base_function, prompt_of(1, 40))
    assert len(engine.generate_all([Request("a", prompt_of(2), base_function, GREEDY)])) == 1


def test_a_cancellation_is_told_even_where_the_step_fails(
    engine: Engine, base_function: PersonaFunction, prompt_of: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> list[Any]:
        raise RuntimeError("out of luck")

    for name in "ab":
        engine.add(Request(name, prompt_of(1), base_function, GREEDY))
    engine.cancel("a")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", fail)
        with pytest.raises(RuntimeError):
            engine.step()
    assert [output.request_id for output in engine.abandon()] == ["b"]
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("a", "cancelled")]
    assert not engine.has_work


def test_a_persona_that_was_served_once_leaves_next_to_nothing(
    tiny_base: Base, make_function: Function, prompt_of: Prompt
) -> None:
    """Not its mask, nor anything else whose size is that of the model."""
    settings = EngineSettings(max_num_seqs=32, max_model_len=64, prefix_cache_bytes=1 << 20, pack_cache_bytes=1 << 20)
    once = SamplingParams(max_tokens=1, temperature=0.0)

    def serve(engine: Engine, seeds: range) -> None:
        engine.generate_all(
            Request(str(seed), prompt_of(seed, 30), make_function(tiny_base, seed), once) for seed in seeds
        )

    with Engine(tiny_base, settings) as engine:
        serve(engine, range(200))  # caches fill up
        tracemalloc.start()
        try:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            serve(engine, range(200, 600))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        alive = [type(thing) for thing in gc.get_objects()]
    assert grown / 400 < 2000  # bytes; a third of the bundled model's mask
    assert alive.count(SubNetwork) < 200
    assert alive.count(Sequence) == 0


def test_a_slot_gives_the_memory_of_a_long_context_back(tiny_base: Base, prompt_of: Prompt) -> None:
    base_function = PersonaFunction(f"base:{tiny_base.fingerprint}", "town")
    bytes_per_token = KVGeometry.of(tiny_base.config, tiny_base.dtype).bytes_per_token
    settings = EngineSettings(
        max_num_seqs=1, max_model_len=512, kv_cache_bytes=512 * bytes_per_token, prefix_cache_bytes=0
    )
    with Engine(tiny_base, settings) as engine:
        keys = engine.runner._kv.keys[0][0, 0]  # [max_len, head_dim] of the one slot's first head
        run_out_one(engine, Request("long", prompt_of(1, 500), base_function, GREEDY))
        assert keys[200:380].abs().sum() > 0
        run_out_one(engine, Request("short", prompt_of(2, 5), base_function, GREEDY))
        assert keys[200:380].abs().sum() == 0
        assert keys[:5].abs().sum() > 0
