from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from masquerade_engine import Base, PersonaFunction
from masquerade_engine import pack_cache as module
from masquerade_engine.ffn_weights import CheckpointWeights
from masquerade_engine.pack_cache import PackCache
from masquerade_engine.residency import ResidencyPolicy
from masquerade_kernels.packs import FFNLayer, PackFormat, pack_bytes
from masquerade_masks import SubNetwork

Function = Callable[..., PersonaFunction]
FORM = PackFormat(torch.float32, torch.device("cpu"))
PLENTY = 1 << 30


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def make_cache(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], PackCache]]:
    monkeypatch.setattr(module, "_REST", 0.0)
    made: list[PackCache] = []

    def make(budget: int = PLENTY) -> PackCache:
        made.append(PackCache(CheckpointWeights(tiny_base.path, tiny_base.shape.num_layers), budget, FORM))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def personas(tiny_base: Base, make_function: Function) -> list[SubNetwork]:
    """Four of 30 % each: together, chance keeps them to three quarters of the neurons."""
    functions = [make_function(tiny_base, seed, sparsity=0.7) for seed in range(4)]
    return [function.subnetwork for function in functions if function.subnetwork is not None]


def digests(members: list[SubNetwork]) -> set[str]:
    return {member.digest for member in members}


def test_a_cast_that_is_busy_together_gets_one_pack(
    make_cache: Callable[..., PackCache], personas: list[SubNetwork]
) -> None:
    cache = make_cache()
    for persona in personas:
        cache.want(persona, "town")
    wait_until(lambda: cache.residency(personas[0].digest) == "compact")
    wait_until(lambda: set(cache.resident.facts.get("cast:town", NOTHING).members) == digests(personas))
    pack = cache.resident.packs["cast:town"]
    assert pack.fraction < 0.9
    assert pack.num_bytes < cache.num_bytes


def test_personas_of_two_casts_share_no_pack(make_cache: Callable[..., PackCache], personas: list[SubNetwork]) -> None:
    cache = make_cache()
    for index, persona in enumerate(personas):
        cache.want(persona, f"town {index % 2}")
    wait_until(lambda: {"cast:town 0", "cast:town 1"} <= cache.resident.packs.keys())
    assert cache.resident.facts["cast:town 0"].members == digests(personas[::2])
    assert cache.resident.facts["cast:town 1"].members == digests(personas[1::2])


def test_a_new_version_takes_the_old_ones_place_and_the_others_are_covered_meanwhile(
    make_cache: Callable[..., PackCache], personas: list[SubNetwork]
) -> None:
    cache = make_cache()
    for persona in personas[:3]:
        cache.want(persona, "town")
    wait_until(lambda: set(cache.resident.facts.get("cast:town", NOTHING).members) == digests(personas[:3]))
    cache.drop(personas[0].digest)
    assert cache.residency(personas[1].digest) is not None
    cache.want(personas[3], "town")
    wait_until(lambda: set(cache.resident.facts.get("cast:town", NOTHING).members) == digests(personas[1:]))


def test_a_cast_whose_personas_are_gone_gives_its_memory_back(
    make_cache: Callable[..., PackCache], personas: list[SubNetwork]
) -> None:
    cache = make_cache()
    for persona in personas:
        cache.want(persona, "town")
    wait_until(lambda: "cast:town" in cache.resident.packs)
    for persona in personas:
        cache.drop(persona.digest)
    wait_until(lambda: not cache.resident.packs)
    assert cache.num_bytes == 0


def test_the_budget_holds_whatever_is_wanted(make_cache: Callable[..., PackCache], personas: list[SubNetwork]) -> None:
    budget = 2 * pack_bytes(personas[:1], FORM)
    cache = make_cache(budget)
    for _ in range(5):
        for persona in personas:
            cache.want(persona, "town")
            assert cache.num_bytes <= budget
        time.sleep(0.01)
    wait_until(lambda: len(cache.resident.packs) == 2)
    assert sum(pack.num_bytes for pack in cache.resident.packs.values()) <= budget


def test_a_cast_without_a_pack_is_not_looked_at_for_every_request(
    make_cache: Callable[..., PackCache],
    tiny_base: Base,
    make_function: Function,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    decide = ResidencyPolicy.cast_members

    def count(self: ResidencyPolicy, *arguments: Any) -> list[str]:
        looks.append("a look")
        return decide(self, *arguments)

    monkeypatch.setattr(ResidencyPolicy, "cast_members", count)
    monkeypatch.setattr(module, "_REST", 1e9)
    cache = make_cache(0)
    everybody = [make_function(tiny_base, seed, sparsity=0.1).subnetwork for seed in range(8)]  # a union of nearly all
    cache.want(everybody[0], "town")
    wait_until(lambda: looks != [])
    for persona in everybody:
        cache.want(persona, "town")
    time.sleep(0.1)
    assert looks == ["a look"]


def test_only_so_many_casts_are_followed(
    make_cache: Callable[..., PackCache], personas: list[SubNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_CASTS", 2)
    cache = make_cache()
    for name in ("first", "second", "third"):
        for persona in personas:
            cache.want(persona, name)
    wait_until(lambda: {"cast:second", "cast:third"} <= cache.resident.packs.keys())
    assert "cast:first" not in cache.resident.packs
    assert list(cache._casts) == ["second", "third"]


@dataclass
class SlowWeights:
    """Weights that come when they are let."""

    inner: CheckpointWeights
    may_go_on: bool = False
    num_read: int = field(default=0)

    def layers(self) -> Iterator[FFNLayer]:
        for layer in self.inner.layers():
            self.num_read += 1
            yield layer
            wait_until(lambda: self.may_go_on)


def test_a_pack_that_nobody_wants_any_more_is_given_up(tiny_base: Base, personas: list[SubNetwork]) -> None:
    weights = SlowWeights(CheckpointWeights(tiny_base.path, tiny_base.shape.num_layers))
    cache = PackCache(weights, PLENTY, FORM)
    try:
        cache.want(personas[0], "town")
        wait_until(lambda: weights.num_read == 1)
        cache.drop(personas[0].digest)
        weights.may_go_on = True
        cache.want(personas[1], "town")
        wait_until(lambda: cache.residency(personas[1].digest) == "compact")
        assert cache.residency(personas[0].digest) is None
        assert weights.num_read <= 2 + tiny_base.shape.num_layers
    finally:
        cache.close()


def test_a_damaged_checkpoint_leaves_personas_on_the_packs_that_cover_them(
    tiny_base: Base, personas: list[SubNetwork], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def layers(self) -> Iterator[FFNLayer]:
            raise OSError("gone")

    cache = PackCache(Broken(), PLENTY, FORM)
    try:
        cache.want(personas[0], "town")
        wait_until(lambda: cache.num_bytes == 0)
        assert cache.residency(personas[0].digest) is None
        assert "no pack for" in caplog.text
    finally:
        cache.close()


NOTHING = module.PackFacts(frozenset(), 0.0)
