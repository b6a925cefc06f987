"""Random traffic against a runner that knows what every slot and block holds."""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import pytest

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.prefix_index import BLOCK, Namespace, PrefixIndex
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams, TokenOutput
from masquerade_engine.scheduler import Scheduler, SchedulerLimits
from masquerade_engine.sequence import Batch, SampledToken, Sequence
from masquerade_masks import MasqueradeError, QueueFull, SettingError

STOP = 0


def kv_of(namespace: Namespace, tokens: Tokens[int]) -> list[int]:
    """What stands for a token's keys and values: they depend on the function and on all tokens up to it."""
    values: list[int] = []
    for token in tokens:
        values.append(hash((values[-1] if values else namespace, token)))
    return values


def next_token(namespace: Namespace, tokens: Tokens[int]) -> int:
    """The model: 1 in 24 tokens ends the generation."""
    return zlib.crc32(repr((namespace, tokens)).encode()) % 24


class BookkeepingRunner:
    """Runs batches on names of KV instead of KV, and refuses what no runner could compute rightly."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._slots: dict[int, list[int]] = defaultdict(list)
        self._blocks: dict[int, list[int]] = {}
        self.num_prefilled = 0

    def run(self, batch: Batch) -> list[SampledToken]:
        for copy in batch.stores:
            for index, block in enumerate(copy.blocks):
                start = copy.start + index * BLOCK
                self._blocks[block] = self._slots[copy.slot][start : start + BLOCK]
                assert len(self._blocks[block]) == BLOCK
        for trim in batch.trims:
            assert trim.start == self._limits.kept_slot_tokens < trim.stop
            assert len(self._slots[trim.slot]) <= trim.stop
            del self._slots[trim.slot][trim.start :]
        for copy in batch.loads:
            assert copy.start == 0
            self._slots[copy.slot] = [value for block in copy.blocks for value in self._blocks[block]]
        slots = [chunk.sequence.slot for chunk in batch.chunks]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self._limits.max_num_seqs))
        for chunk in batch.chunks:
            expected = kv_of(chunk.sequence.namespace, chunk.sequence.tokens[: chunk.stop])
            slot = self._slots[chunk.sequence.slot]
            assert slot[: chunk.start] == expected[: chunk.start]
            slot[chunk.start :] = expected[chunk.start :]
            self.num_prefilled += 0 if chunk.start >= chunk.sequence.num_prompt else chunk.num_tokens
        return [SampledToken(next_token(s.namespace, s.tokens)) for s in batch.sampling]


@dataclass
class Ledger:
    """What was asked for and what came of it."""

    limits: SchedulerLimits
    asked: dict[str, Request] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, TokenOutput] = field(default_factory=dict)

    def ask(self, request: Request) -> None:
        self.asked[request.id] = request
        self.given[request.id] = []

    def note(self, output: TokenOutput) -> None:
        assert output.request_id in self.asked
        assert output.request_id not in self.ended
        given = self.given[output.request_id]
        if output.token_id is not None:
            given.append(output.token_id)
        assert output.num_output_tokens == len(given)
        if output.finish_reason is not None:
            self.ended[output.request_id] = output
            self._audit(self.asked[output.request_id], given, output)

    def _audit(self, request: Request, given: list[int], last: TokenOutput) -> None:
        alone = self._alone(request)
        if request.prefill_only:
            assert given == []
            assert last.finish_reason in ("length", "cancelled")
        elif last.token_id is not None:
            assert given == alone
            assert last.finish_reason == ("stop" if given[-1] == STOP else "length")
        else:
            assert given == alone[: len(given)]
            assert len(given) < len(alone)
            cut = "length" if given else "deadline"
            assert last.finish_reason == "cancelled" or (request.deadline_s and last.finish_reason == cut)

    def _alone(self, request: Request) -> list[int]:
        """The tokens that the request gets with the engine to itself."""
        namespace = (request.function.digest, request.function.cast)
        tokens = list(request.prompt)
        while True:
            tokens.append(next_token(namespace, tokens))
            num_output = len(tokens) - len(request.prompt)
            full = num_output >= request.sampling.max_tokens or len(tokens) >= self.limits.max_model_len
            if full or tokens[-1] == STOP:
                return tokens[len(request.prompt) :]


class Town:
    """Random requests of a few personas in a few casts, on one scheduler."""

    def __init__(self, seed: int, *, sharing: bool = True) -> None:
        self.draw = draw = random.Random(seed)
        max_num_seqs = draw.randrange(1, 6)
        max_model_len = draw.randrange(40, 100)
        self.limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            prefill_chunk=draw.choice([5, 16, 33, 64, 200]),
            max_queue=draw.choice([0, 3, 20]),
            kv_tokens=draw.randrange(max_model_len, max_model_len * max_num_seqs + 1),
            kept_slot_tokens=draw.choice([0, 20, 100]),
        )
        self.now = 0.0
        self.prefixes = PrefixIndex(draw.choice([0, 2, 5, 12, 60]) if sharing else 0)
        self.scheduler = Scheduler(self.limits, self.prefixes, frozenset({STOP}), lambda: self.now)
        self.runner = BookkeepingRunner(self.limits)
        self.ledger = Ledger(self.limits)
        self.sharing = sharing
        self.refused: list[MasqueradeError] = []

    def live(self) -> list[str]:
        return [request_id for request_id in self.ledger.asked if request_id not in self.ledger.ended]

    def arrive(self, *, warming: float = 0.1, deadlines: float = 0.2) -> None:
        draw = self.draw
        prefill_only = self.sharing and draw.random() < warming
        request = Request(
            f"{len(self.ledger.asked)}",
            self._prompt(),
            PersonaFunction(f"digest {draw.randrange(3)}", f"cast {draw.randrange(3)}"),
            SamplingParams(max_tokens=draw.randrange(1, 40)),
            priority=draw.randrange(2),
            deadline_s=draw.expovariate(0.05) if draw.random() < deadlines and not prefill_only else None,
            prefill_only=prefill_only,
            pin=prefill_only and draw.random() < 0.3,
        )
        try:
            self.scheduler.add(Sequence(request, Detokenizer(lambda tokens: "")))
        except (QueueFull, SettingError) as error:
            self.refused.append(error)
        else:
            self.ledger.ask(request)

    def _prompt(self) -> tuple[int, ...]:
        draw = self.draw
        longest = self.limits.max_model_len - 1
        persona = random.Random(draw.randrange(3)).choices(range(50), k=draw.randrange(60)) if self.sharing else []
        return (*persona, *draw.choices(range(50), k=draw.randrange(1, 30)))[:longest]

    def cancel(self) -> None:
        request_id = self.draw.choice([*self.live(), "unheard of"])
        told_next = {output.request_id for output in self.scheduler._news}  # was warm when it came
        output = self.scheduler.cancel(request_id)
        assert (output is None) == (request_id in {"unheard of", *told_next})
        if output is not None:
            assert output.finish_reason == "cancelled"
            self.ledger.note(output)

    def step(self) -> Batch:
        scheduler = self.scheduler
        busy = scheduler.has_work
        batch = scheduler.next_batch()
        self._check(batch)
        outputs = scheduler.commit(batch, self.runner.run(batch) if batch.chunks else [])
        assert not busy or batch.chunks or outputs
        for output in outputs:
            self.ledger.note(output)
        self.now += self.draw.random()
        return batch

    def _check(self, batch: Batch) -> None:
        limits, running = self.limits, list(self.scheduler._running.values())
        assert sum(len(sequence.tokens) for sequence in running) <= limits.kv_tokens
        assert len({sequence.slot for sequence in running}) == len(running) <= limits.max_num_seqs
        assert {chunk.sequence for chunk in batch.chunks} <= set(running)
        decoding = [chunk.sequence for chunk in batch.chunks if chunk.sequence.is_decoding]
        assert sum(chunk.num_tokens for chunk in batch.chunks if not chunk.sequence.is_decoding) <= limits.prefill_chunk
        assert {sequence for sequence in running if sequence.is_decoding} == set(decoding)
        assert len(self.live()) == len(running) + self.scheduler.num_waiting + len(self.scheduler._news)
        assert self.prefixes.num_pinned <= self.prefixes.num_blocks // 2
        assert all(sequence.is_running for sequence in self.scheduler._in_flight._claims.values())

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert self.live() == []
        assert self.scheduler._in_flight._claims == {}
        assert self.scheduler._timed == self.scheduler._live == {}


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_whatever_comes(seed: int) -> None:
    town = Town(seed)
    for _ in range(150):
        for _ in range(town.draw.choice([0, 0, 1, 3])):
            town.arrive()
        if town.draw.random() < 0.1:
            town.cancel()
        if town.draw.random() < 0.02:
            town.scheduler.forget(f"digest {town.draw.randrange(3)}")
        town.step()
    town.drain()


def test_the_traffic_above_has_everything_in_it() -> None:
    """Preemptions, deadlines of both kinds, refusals, pins and prefix hits do occur."""
    reasons: set[tuple[str | None, bool]] = set()
    refused: set[type] = set()
    num_preempted = num_cached = num_pinned = num_trims = 0
    for seed in range(12):
        town = Town(seed)
        for _ in range(150):
            for _ in range(town.draw.choice([0, 0, 1, 3])):
                town.arrive()
            num_trims += len(town.step().trims)
            num_pinned = max(num_pinned, town.prefixes.num_pinned)
        town.drain()
        reasons |= {(output.finish_reason, output.token_id is None) for output in town.ledger.ended.values()}
        refused |= {type(error) for error in town.refused}
        num_preempted += town.scheduler.num_preempted
        num_cached += town.scheduler.num_cached_tokens
    assert reasons == {("stop", False), ("length", False), ("length", True), ("deadline", True)}
    assert refused == {QueueFull, SettingError}
    assert min(num_preempted, num_cached, num_pinned, num_trims) > 0


class TurnTaking:
    """Watches every admission: `admit` stands before the scheduler's own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._admit = scheduler._admit
        self._owed: dict[tuple[int, str], set[str]] = {}  # to whom a cast owes a turn before its next
        self.num_admitted = 0

    def admit(self, sequence: Sequence) -> None:
        self.num_admitted += 1
        level, cast = sequence.level, sequence.request.function.cast
        waiting = list(self._scheduler._waiting[level])
        assert not any(len(queue) for queue in self._scheduler._waiting[:level])
        same_cast = [other for other in waiting if other.request.function.cast == cast]
        if sequence.admitted_at is None:
            assert all(other.admitted_at is None for other in same_cast)
            assert min(int(other.request.id) for other in same_cast) == int(sequence.request.id)
            assert not self._owed.get((level, cast))
        else:
            assert sequence.turn == min(other.turn for other in same_cast if other.admitted_at is not None)
        for (other_level, _), creditors in self._owed.items():
            if other_level == level:
                creditors.discard(cast)
        self._owed[level, cast] = {other.request.function.cast for other in waiting} - {cast}
        self._admit(sequence)


@pytest.mark.parametrize("seed", range(20))
def test_players_first_then_casts_in_turn_then_first_come_first_served(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody waits for another's blocks. Who was preempted goes before all of this."""
    town = Town(seed, sharing=False)
    turns = TurnTaking(town.scheduler)
    monkeypatch.setattr(town.scheduler, "_admit", turns.admit)
    for _ in range(200):
        for _ in range(town.draw.choice([0, 1, 2])):
            town.arrive(deadlines=0.0)
        town.step()
    town.drain()
    assert turns.num_admitted >= 20
