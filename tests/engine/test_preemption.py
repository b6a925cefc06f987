"""Preemption on a real, tiny model: whoever loses a slot goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams
from masquerade_engine.kv_cache import KVGeometry
from masquerade_engine.prefix_index import BLOCK

TOLERANCE = 1e-4  # on a logit, float32
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)

Function = Callable[..., PersonaFunction]
Forced = Callable[..., torch.Tensor]
Prompt = Callable[..., tuple[int, ...]]


@pytest.fixture
def settings(tiny_base: Base) -> Callable[..., EngineSettings]:
    """`settings(kv_tokens, num_blocks)`: everything dense, six slots."""
    bytes_per_token = KVGeometry.of(tiny_base.config, tiny_base.dtype).bytes_per_token

    def make(kv_tokens: int, num_blocks: int) -> EngineSettings:
        return EngineSettings(
            max_num_seqs=6,
            max_model_len=80,
            kv_cache_bytes=kv_tokens * bytes_per_token,
            prefix_cache_bytes=num_blocks * BLOCK * bytes_per_token,
            pack_cache_bytes=0,
        )

    return make


@pytest.mark.parametrize("num_blocks", [0, 3, 100])
def test_a_budget_that_is_outgrown_changes_no_token(
    num_blocks: int,
    tiny_base: Base,
    settings: Callable[..., EngineSettings],
    make_function: Function,
    forced_logits: Forced,
    prompt_of: Prompt,
) -> None:
    functions = [make_function(tiny_base, i % 3, gain=True) for i in range(6)]
    requests = [Request(str(i), prompt_of(i, 12 + 5 * i), functions[i], GREEDY) for i in range(6)]
    with Engine(tiny_base, settings(6 * 80, 100)) as engine:
        roomy = engine.generate_all(requests)
        assert engine.stats().num_preempted == 0
    with Engine(tiny_base, settings(160, num_blocks)) as engine:
        tight = engine.generate_all(requests)
        assert engine.stats().num_preempted >= 3
        decided = 0
        for request in requests:
            given = tight[request.id].token_ids
            assert len(given) == 24
            tokens = request.prompt + given
            alone = forced_logits(engine, request.function, tokens, range(len(request.prompt), len(tokens)))
            top = alone.topk(2).values
            sure = top[:, 0] - top[:, 1] > 2 * TOLERANCE
            assert torch.equal(alone.argmax(-1)[sure], torch.tensor(given)[sure])
            decided += int(sure.sum())
    assert decided > 120  # of 144
    assert tight == roomy


@pytest.mark.parametrize("seed", [None, 5])
def test_a_player_in_an_ambient_slot_changes_nothing_for_either(
    seed: int | None,
    tiny_base: Base,
    make_function: Function,
    prompt_of: Prompt,
) -> None:
    """Greedy and seeded: text, tokens and logprobs of the one that lost its slot go on where they were."""
    function = make_function(tiny_base, 1)
    sampling = replace(GREEDY, seed=seed, temperature=0.8 if seed else 0.0, logprobs=1)
    requests = [Request(name, prompt_of(i, 30), function, sampling, i) for i, name in enumerate(("player", "ambient"))]
    alone = {}
    for request in requests:
        with Engine(tiny_base, EngineSettings(max_num_seqs=1, pack_cache_bytes=0)) as engine:
            alone[request.id] = engine.generate_all([request])[request.id]
    with Engine(tiny_base, EngineSettings(max_num_seqs=1, pack_cache_bytes=0)) as engine:
        player, ambient = requests
        outputs = []
        engine.add(ambient)
        for _ in range(9):
            outputs += engine.step()
        engine.add(player)
        while engine.has_work:
            outputs += engine.step()
        assert engine.stats().num_preempted == 1
    order = [output.request_id for output in outputs]
    assert order == ["ambient"] * 9 + ["player"] * 24 + ["ambient"] * 15
    for request in requests:
        mine = [output for output in outputs if output.request_id == request.id]
        assert tuple(output.token_id for output in mine) == alone[request.id].token_ids
        assert "".join(output.text for output in mine) == alone[request.id].text
        assert [output.num_output_tokens for output in mine] == list(range(1, 25))
