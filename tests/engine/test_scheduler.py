from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams, TokenOutput
from masquerade_engine.scheduler import Scheduler, SchedulerLimits
from masquerade_engine.sequence import Batch, SampledToken, Sequence, Trim
from masquerade_masks import ContextTooLong, FFNShape, Mask, QueueFull, SettingError, SubNetwork

STOP = 0
BASE = PersonaFunction("base:x", "cast")


def make_scheduler(
    num_blocks: int = 0,
    clock: Callable[[], float] = lambda: 0.0,
    loading: Callable[[str], str] = lambda digest: "loaded",
    **limits: float,
) -> Scheduler:
    defaults = {"max_num_seqs": 2, "max_model_len": 100, "prefill_chunk": 32, "max_queue": 4}
    defaults |= {"kv_tokens": 1000, "kept_slot_tokens": 100}
    chosen: dict[str, Any] = defaults | limits
    return Scheduler(SchedulerLimits(**chosen), PrefixIndex(num_blocks), frozenset({STOP}), clock, loading)


def make_sequence(
    name: str,
    num_prompt: int = 5,
    *,
    priority: int = 0,
    cast: str = "cast",
    first: int = 1,
    deadline_s: float | None = None,
    prefill_only: bool = False,
    pin: bool = False,
    own: SubNetwork | None = None,
    **sampling: Any,
) -> Sequence:
    """The prompt counts up from `first`; `own` is a sub-network with FFN weights of its own."""
    function = replace(BASE, cast=cast) if own is None else PersonaFunction(own.digest, cast, own)
    parameters = SamplingParams(**({"max_tokens": 3} | sampling))
    request = Request(
        name,
        tuple(range(first, first + num_prompt)),
        function,
        parameters,
        priority,
        deadline_s=deadline_s,
        prefill_only=prefill_only,
        pin=pin,
    )
    return Sequence(request, Detokenizer(lambda tokens: "".join(chr(96 + t) for t in tokens), parameters.stop))


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(scheduler: Scheduler, token_id: int = 1) -> tuple[Batch, list[TokenOutput]]:
    batch = scheduler.next_batch()
    return batch, scheduler.commit(batch, [SampledToken(token_id) for _ in batch.sampling])


def names(batch: Batch) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.num_tokens) for chunk in batch.chunks]


def run_out(scheduler: Scheduler) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while scheduler.has_work:
        outputs += step(scheduler)[1]
    return outputs


def test_a_request_is_prefilled_then_decoded_then_done() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a"))
    assert names(step(scheduler)[0]) == [("a", 0, 5)]
    assert names(step(scheduler)[0]) == [("a", 5, 1)]
    batch, outputs = step(scheduler)
    assert names(batch) == [("a", 6, 1)]
    assert outputs[0].finish_reason == "length"
    assert outputs[0].num_output_tokens == 3
    assert scheduler.num_running == 0


def test_a_long_prompt_is_prefilled_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=9))
    step(scheduler)
    scheduler.add(make_sequence("b", 70))
    assert names(step(scheduler)[0]) == [("a", 5, 1), ("b", 0, 32)]
    batch, outputs = step(scheduler)
    assert names(batch) == [("a", 6, 1), ("b", 32, 32)]
    assert [output.request_id for output in outputs] == ["a"]
    batch, outputs = step(scheduler)
    assert names(batch) == [("a", 7, 1), ("b", 64, 6)]
    assert [output.request_id for output in outputs] == ["a", "b"]


def test_slots_bound_what_runs_and_the_lowest_is_taken() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add(make_sequence(name, max_tokens=1 if name == "a" else 5))
    batch = scheduler.next_batch()
    assert [(chunk.sequence.request.id, chunk.sequence.slot) for chunk in batch.chunks] == [("a", 0), ("b", 1)]
    assert scheduler.num_waiting == 1
    scheduler.commit(batch, [SampledToken(1), SampledToken(1)])
    batch = scheduler.next_batch()
    assert [(chunk.sequence.request.id, chunk.sequence.slot) for chunk in batch.chunks] == [("b", 1), ("c", 0)]


def test_a_player_goes_before_ambient_chatter() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("chatter", priority=1))
    scheduler.add(make_sequence("player", priority=0))
    assert names(step(scheduler)[0]) == [("player", 0, 5)]


def test_the_queue_is_bounded_beyond_what_can_run() -> None:
    scheduler = make_scheduler(max_queue=1)
    for name in "abc":
        scheduler.add(make_sequence(name))
    assert not scheduler.has_room
    with pytest.raises(QueueFull) as refused:
        scheduler.add(make_sequence("d"))
    assert refused.value.limit == 1
    assert refused.value.retry_after_s >= 1
    step(scheduler)
    assert not scheduler.has_room


def test_a_prompt_must_leave_room_for_a_token() -> None:
    scheduler = make_scheduler(max_model_len=10)
    with pytest.raises(ContextTooLong) as refused:
        scheduler.add(make_sequence("a", 10))
    assert (refused.value.num_tokens, refused.value.limit) == (11, 10)
    scheduler.add(make_sequence("b", 9))


def test_generation_ends_at_the_limit_of_the_context() -> None:
    scheduler = make_scheduler(max_model_len=10)
    scheduler.add(make_sequence("a", 8, max_tokens=50))
    outputs = run_out(scheduler)
    assert len(outputs) == 2
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "a"},
        {"name": "b", "num_prompt": 0},
        {"name": "b", "priority": 2},
        {"name": "b", "deadline_s": 0.0},
        {"name": "b", "pin": True, "num_prompt": 40},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a"))
    with pytest.raises(SettingError):
        scheduler.add(make_sequence(**bad))


def test_a_running_request_is_cancelled_at_once_and_its_slot_is_free() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a"))
    scheduler.add(make_sequence("b"))
    step(scheduler)
    output = scheduler.cancel("a")
    assert output is not None
    assert (output.finish_reason, output.token_id, output.num_output_tokens) == ("cancelled", None, 1)
    assert names(step(scheduler)[0]) == [("b", 0, 5)]


def test_a_waiting_request_is_cancelled_and_an_unknown_one_is_nothing() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a"))
    scheduler.add(make_sequence("b"))
    assert scheduler.cancel("b") is not None
    assert scheduler.cancel("b") is None
    assert scheduler.num_waiting == 1


def test_a_stop_token_ends_and_adds_no_text() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=9))
    assert step(scheduler, 2)[1][0].text == "b"
    output = step(scheduler, STOP)[1][0]
    assert (output.text, output.token_id, output.finish_reason) == ("", STOP, "stop")


def test_a_request_may_ignore_the_stop_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=2, ignore_eos=True))
    assert step(scheduler, STOP)[1][0].finish_reason is None


def test_a_stop_string_ends_across_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", max_tokens=9, stop=("bc",)))
    assert step(scheduler, 1)[1][0].text == "a"
    assert step(scheduler, 2)[1][0].text == ""
    output = step(scheduler, 3)[1][0]
    assert (output.text, output.finish_reason) == ("", "stop")


def test_a_known_prefix_is_loaded_and_not_computed() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_sequence("a", 2 * BLOCK, max_tokens=1))
    step(scheduler)
    scheduler.add(make_sequence("b", 2 * BLOCK + 3))
    batch, outputs = step(scheduler)
    assert names(batch) == [("b", 2 * BLOCK, 3)]
    assert [(store.slot, store.start) for store in batch.stores] == [(0, 0)]
    assert batch.loads[0].blocks == batch.stores[0].blocks
    assert outputs[0].num_cached_tokens == 2 * BLOCK


def test_a_finished_answer_is_kept_for_the_next_turn() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_sequence("a", BLOCK - 2, max_tokens=4))
    run_out(scheduler)
    assert scheduler.next_batch() == Batch(())  # nothing runs, so the copy waits
    scheduler.add(make_sequence("b"))
    stores = scheduler.next_batch().stores
    assert [(store.slot, store.start, len(store.blocks)) for store in stores] == [(0, 0, 1)]


def test_requests_that_come_together_share_the_prefix_of_the_first() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=4)
    for name in "abc":
        scheduler.add(make_sequence(name, 32))
    assert names(step(scheduler)[0]) == [("a", 0, 32)]
    shared = 31 // BLOCK * BLOCK
    assert names(step(scheduler)[0])[:2] == [("a", 32, 1), ("b", shared, 32 - shared)]


def test_after_a_failure_nothing_runs_and_no_kv_is_trusted() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for name in "abc":
        scheduler.add(make_sequence(name, 20, max_tokens=9))
    step(scheduler)
    step(scheduler)
    assert [(o.request_id, o.finish_reason) for o in scheduler.abandon()] == [("a", "error"), ("b", "error")]
    batch, _ = step(scheduler)
    assert names(batch) == [("c", 0, 20)]
    assert batch.stores == ()
    assert batch.loads == ()


# Levels and casts.


def test_casts_take_turns_and_each_is_first_come_first_served() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queue=9)
    for name, cast in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")):
        scheduler.add(make_sequence(name, cast=cast, max_tokens=1))
    assert [output.request_id for output in run_out(scheduler)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_each_priority_has_its_own_places_in_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1, max_queue=0)
    scheduler.add(make_sequence("chatter", priority=1))
    assert not scheduler.has_room
    with pytest.raises(QueueFull):
        scheduler.add(make_sequence("more chatter", priority=1))
    scheduler.add(make_sequence("player"))


def test_a_players_prompt_goes_before_an_ambient_one_that_has_begun() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("chatter", 90, priority=1))
    assert names(step(scheduler)[0]) == [("chatter", 0, 32)]
    scheduler.add(make_sequence("player", 20))
    assert names(step(scheduler)[0]) == [("player", 0, 20), ("chatter", 32, 12)]


def test_a_player_takes_the_slot_of_the_ambient_request_that_came_last() -> None:
    scheduler = make_scheduler(num_blocks=8, prefill_chunk=64)
    num_prompt = BLOCK + 4
    for name in ("first", "last"):
        scheduler.add(make_sequence(name, num_prompt, priority=1, cast=name, max_tokens=9))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_sequence("player", max_tokens=1))
    batch, outputs = step(scheduler)
    assert names(batch) == [("first", num_prompt + 1, 1), ("player", 0, 5)]
    assert batch.stores == ()  # its prompt's block was stored before, and no other is whole
    assert {output.request_id for output in outputs} == {"first", "player"}
    assert (scheduler.num_preempted, scheduler.num_waiting) == (1, 1)
    batch, outputs = step(scheduler)
    assert names(batch) == [("first", num_prompt + 2, 1), ("last", BLOCK, 6)]
    assert [load.slot for load in batch.loads] == [1]
    assert [output.num_output_tokens for output in outputs] == [4, 3]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]  # what the first admission found


def test_a_player_takes_no_slot_from_a_player() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a"))
    step(scheduler)
    scheduler.add(make_sequence("b"))
    assert names(step(scheduler)[0]) == [("a", 5, 1)]


def test_ambient_is_served_with_what_players_leave() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("chatter", priority=1, max_tokens=8))
    finished = []
    for number in range(30):  # one player at a time, always one there
        if number % 3 == 0:
            scheduler.add(make_sequence(f"player {number}", max_tokens=3))
        finished += [output.request_id for output in step(scheduler)[1] if output.finish_reason]
    assert "chatter" in finished


def test_nobody_overtakes_one_that_waits_for_room() -> None:
    scheduler = make_scheduler(max_num_seqs=3, kv_tokens=100)
    scheduler.add(make_sequence("a", 60, max_tokens=30))
    for _ in range(3):
        step(scheduler)
    scheduler.add(make_sequence("large", 50))
    scheduler.add(make_sequence("small", 5))
    scheduler.add(make_sequence("chatter", 5, priority=1))
    assert names(step(scheduler)[0]) == [("a", 61, 1)]


# The KV budget.


@pytest.mark.parametrize(("num_prompt", "num_running"), [(49, 2), (50, 1)])
def test_the_budget_bounds_what_is_admitted(num_prompt: int, num_running: int) -> None:
    scheduler = make_scheduler(kv_tokens=100, prefill_chunk=200)
    for name in "ab":
        scheduler.add(make_sequence(name, num_prompt))
    step(scheduler)
    assert scheduler.num_running == num_running


def test_who_outgrows_the_budget_goes_on_later_with_all_tokens() -> None:
    scheduler = make_scheduler(max_num_seqs=3, kv_tokens=100, prefill_chunk=100)
    expected = {}
    for name, first in (("a", 1), ("b", 100), ("c", 200)):
        scheduler.add(make_sequence(name, 25, first=first, max_tokens=20))
        expected[name] = list(range(20))
    given: dict[str, list[int]] = {name: [] for name in expected}
    ends = []
    while scheduler.has_work:
        batch = scheduler.next_batch()
        held = sum(len(chunk.sequence.tokens) for chunk in batch.chunks)
        assert held <= 100
        tokens = [SampledToken(100 + sequence.num_output) for sequence in batch.sampling]
        for output in scheduler.commit(batch, tokens):
            assert output.token_id is not None
            given[output.request_id].append(output.token_id - 100)
            ends += [output.request_id] if output.finish_reason else []
    assert given == expected
    assert ends == ["a", "b", "c"]
    assert scheduler.num_preempted == 1  # `c`, once: it is let in again only when there is room to grow


def test_ambient_chatter_yields_to_a_players_growth_though_it_came_first() -> None:
    scheduler = make_scheduler(kv_tokens=60, max_model_len=50, prefill_chunk=60)
    scheduler.add(make_sequence("chatter", 25, priority=1, max_tokens=20))
    step(scheduler)
    scheduler.add(make_sequence("player", 25, max_tokens=20))
    while not scheduler.num_preempted:
        batch, _ = step(scheduler)
    assert [(name, num_tokens) for name, _, num_tokens in names(batch)] == [("player", 1)]
    assert scheduler.num_preempted == 1


def test_what_is_read_in_a_step_is_not_overwritten_by_what_is_preempted_in_it() -> None:
    scheduler = make_scheduler(num_blocks=2, prefill_chunk=64)
    scheduler.add(make_sequence("first", BLOCK + 1, max_tokens=1))
    run_out(scheduler)
    scheduler.add(make_sequence("chatter", 5, priority=1, first=500, max_tokens=60))
    for _ in range(2 * BLOCK):
        step(scheduler)
    scheduler.add(make_sequence("reader", BLOCK + 1))
    scheduler.add(make_sequence("player", 5, first=300))
    batch = scheduler.next_batch()
    assert scheduler.num_preempted == 1
    read = {block for load in batch.loads for block in load.blocks}
    written = {block for store in batch.stores for block in store.blocks}
    assert len(read) == len(written) == 1  # of the two blocks that the chatter has filled
    assert read.isdisjoint(written)


def test_a_preempted_sequence_keeps_its_place_text_and_draws() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    chatter = make_sequence("chatter", priority=1, max_tokens=9, stop=("bc",), seed=3)
    scheduler.add(chatter)
    scheduler.add(make_sequence("more chatter", priority=1))
    step(scheduler, 1)
    draws = random.Random(3)
    assert chatter.draws.random() == draws.random()
    assert step(scheduler, 2)[1][0].text == ""  # held back: it may be a stop string
    scheduler.add(make_sequence("player", max_tokens=1))
    step(scheduler, 5)
    batch, outputs = step(scheduler, 3)
    assert names(batch) == [("chatter", 0, 7)]
    assert (outputs[0].text, outputs[0].finish_reason) == ("", "stop")
    assert outputs[0].num_output_tokens == 3
    assert chatter.draws.random() == draws.random()


def test_a_preempted_request_can_be_cancelled() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("chatter", priority=1, max_tokens=9))
    step(scheduler)
    scheduler.add(make_sequence("player", max_tokens=9))
    step(scheduler)
    output = scheduler.cancel("chatter")
    assert output is not None
    assert (output.finish_reason, output.num_output_tokens) == ("cancelled", 1)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)


def test_a_prompt_is_cancelled_between_its_chunks() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_sequence("a", 70))
    step(scheduler)
    assert scheduler.cancel("a") is not None
    assert not scheduler.has_work
    assert scheduler.next_batch() == Batch(())


def test_a_long_context_gives_its_memory_back() -> None:
    scheduler = make_scheduler(max_num_seqs=1, kept_slot_tokens=10, prefill_chunk=50)
    scheduler.add(make_sequence("a", 50, max_tokens=1))
    step(scheduler)
    scheduler.add(make_sequence("b", 8, max_tokens=2))
    assert scheduler.next_batch().trims == (Trim(0, 10, 50),)
    run_out(scheduler)
    scheduler.add(make_sequence("c", 8))
    assert scheduler.next_batch().trims == ()


# Deadlines.


def test_a_request_that_waits_beyond_its_deadline_ends_without_a_token() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_num_seqs=1, clock=clock)
    scheduler.add(make_sequence("a", max_tokens=9))
    scheduler.add(make_sequence("b", deadline_s=2.0))
    clock.now = 1.9
    assert {output.request_id for output in step(scheduler)[1]} == {"a"}
    clock.now = 2.0
    late, other = step(scheduler)[1]
    assert (late.request_id, late.finish_reason, late.token_id) == ("b", "deadline", None)
    assert other.request_id == "a"
    assert (scheduler.num_deadline, scheduler.num_waiting) == (1, 0)


def test_a_deadline_within_the_prompt_ends_it() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.add(make_sequence("a", 70, deadline_s=2.0))
    step(scheduler)
    clock.now = 3.0
    batch, outputs = step(scheduler)
    assert batch == Batch(())
    assert [output.finish_reason for output in outputs] == ["deadline"]
    assert not scheduler.has_work


def test_a_first_token_that_comes_too_late_is_not_given() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.add(make_sequence("a", deadline_s=2.0))
    batch = scheduler.next_batch()
    clock.now = 3.0
    (output,) = scheduler.commit(batch, [SampledToken(1)])
    assert (output.finish_reason, output.token_id, output.num_output_tokens) == ("deadline", None, 0)


def test_a_deadline_after_the_first_token_cuts_the_answer() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock)
    scheduler.add(make_sequence("a", max_tokens=9, deadline_s=2.0))
    step(scheduler)
    clock.now = 1.0
    step(scheduler)
    clock.now = 3.0
    (output,) = step(scheduler)[1]
    assert (output.finish_reason, output.token_id, output.num_output_tokens) == ("length", None, 2)


def test_a_preempted_answer_is_cut_by_its_deadline() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_num_seqs=1, clock=clock)
    scheduler.add(make_sequence("chatter", priority=1, max_tokens=9, deadline_s=2.0))
    step(scheduler)
    scheduler.add(make_sequence("player", max_tokens=9))
    step(scheduler)
    clock.now = 2.0
    outputs = step(scheduler)[1]
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("chatter", "length"), ("player", None)]


# Sharing what is in flight.


def test_one_prompt_is_computed_once_for_all_who_come_together() -> None:
    scheduler = make_scheduler(num_blocks=20, max_num_seqs=16, max_model_len=300, prefill_chunk=512, kv_tokens=9000)
    for number in range(16):
        persona = make_sequence(str(number), 170)
        question = tuple(range(1000 + 30 * number, 1030 + 30 * number))
        persona.request = replace(persona.request, prompt=persona.request.prompt + question)
        scheduler.add(Sequence(persona.request, persona.detokenizer))
    assert names(step(scheduler)[0]) == [("0", 0, 200)]
    second = names(step(scheduler)[0])
    assert second == [("0", 200, 1), *((str(number), 160, 40) for number in range(1, 13)), ("13", 160, 32)]


@pytest.mark.parametrize(
    ("num_slots", "kv_tokens", "expected"), [(3, 1000, ["a", "other"]), (2, 1000, ["a"]), (3, 89, ["a"])]
)
def test_others_go_ahead_of_one_that_waits_for_blocks_unless_it_needs_the_room(
    num_slots: int, kv_tokens: int, expected: list[str]
) -> None:
    scheduler = make_scheduler(
        num_blocks=8, max_num_seqs=num_slots, max_model_len=80, prefill_chunk=64, kv_tokens=kv_tokens
    )
    scheduler.add(make_sequence("a", 40))
    scheduler.add(make_sequence("same", 40))
    scheduler.add(make_sequence("other", 8, first=50))
    assert [name for name, _, _ in names(step(scheduler)[0])] == expected
    assert ("same", 32, 8) in names(step(scheduler)[0])


def test_the_slot_of_who_will_be_waited_for_is_not_taken() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=3)
    scheduler.add(make_sequence("old chatter", 5, priority=1, first=500, max_tokens=50))
    scheduler.add(make_sequence("chatter", 90, priority=1))
    scheduler.add(make_sequence("player", 5, first=600, max_tokens=50))
    step(scheduler)
    scheduler.add(make_sequence("same", 60))  # waits for the chatter's blocks, and then for a slot
    scheduler.add(make_sequence("stranger", 5, first=700))
    batch, _ = step(scheduler)
    assert "stranger" not in [name for name, _, _ in names(batch)]
    assert scheduler.num_preempted == 0


def test_who_shares_a_beginning_waits_for_that_only() -> None:
    scheduler = make_scheduler(num_blocks=8, prefill_chunk=64)
    scheduler.add(make_sequence("long", 90))
    sharing = make_sequence("sharing", 40)
    prompt = sharing.request.prompt[: 2 * BLOCK] + (900,) * 8
    scheduler.add(Sequence(replace(sharing.request, prompt=prompt), sharing.detokenizer))
    assert names(step(scheduler)[0]) == [("long", 0, 64)]
    assert names(step(scheduler)[0]) == [("long", 64, 26), ("sharing", 2 * BLOCK, 8)]


def test_who_waits_for_a_cancelled_one_goes_on_alone() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for name in "ab":
        scheduler.add(make_sequence(name, 70))
    assert names(step(scheduler)[0]) == [("a", 0, 32)]
    scheduler.cancel("a")
    assert names(step(scheduler)[0]) == [("b", 32, 32)]


def test_a_player_who_waits_for_ambient_blocks_lends_its_urgency() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_seqs=3)
    scheduler.add(make_sequence("chatter", 64, priority=1))
    step(scheduler)
    scheduler.add(make_sequence("player", 60))
    scheduler.add(make_sequence("stranger", 60, first=900))
    assert names(step(scheduler)[0]) == [("stranger", 0, 32)]  # it was there before anybody waited for the chatter
    assert names(step(scheduler)[0]) == [("chatter", 32, 32)]
    batch, _ = step(scheduler)
    assert names(batch) == [("chatter", 64, 1), ("stranger", 32, 28), ("player", 59 // BLOCK * BLOCK, 4)]


def test_nobody_waits_for_blocks_of_another_cast() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for cast in "ab":
        scheduler.add(make_sequence(cast, 20, cast=cast))
    assert names(step(scheduler)[0]) == [("a", 0, 20), ("b", 0, 12)]


def test_without_a_prefix_cache_nobody_waits() -> None:
    scheduler = make_scheduler(num_blocks=0)
    for name in "ab":
        scheduler.add(make_sequence(name, 20))
    assert names(step(scheduler)[0]) == [("a", 0, 20), ("b", 0, 12)]


# Warming.


def test_warming_computes_whole_blocks_and_ends_without_a_token() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_sequence("warm", 2 * BLOCK + 5, prefill_only=True, priority=1))
    batch, outputs = step(scheduler)
    assert names(batch) == [("warm", 0, 2 * BLOCK)]
    assert batch.sampling == []
    (output,) = outputs
    assert (output.finish_reason, output.token_id, output.num_output_tokens) == ("length", None, 0)
    assert (output.num_prompt_tokens, output.num_cached_tokens) == (2 * BLOCK + 5, 0)
    scheduler.add(make_sequence("a", 2 * BLOCK + 5))
    assert names(step(scheduler)[0]) == [("a", 2 * BLOCK, 5)]


@pytest.mark.parametrize("num_prompt", [5, 2 * BLOCK, 2 * BLOCK + 5])
def test_what_is_warm_needs_no_step(num_prompt: int) -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    scheduler.add(make_sequence("a", 2 * BLOCK + 9, max_tokens=1))
    run_out(scheduler)
    scheduler.add(make_sequence("busy", max_tokens=9, first=500))
    step(scheduler)
    scheduler.add(make_sequence("waiting", first=600))
    scheduler.add(make_sequence("warm", num_prompt, prefill_only=True))
    outputs = step(scheduler)[1]
    assert [output.request_id for output in outputs] == ["warm", "busy"]
    assert outputs[0].num_cached_tokens == num_prompt // BLOCK * BLOCK


def test_warming_gives_way_to_everybody() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    scheduler.add(make_sequence("warm", 70, prefill_only=True, first=500))
    step(scheduler)
    scheduler.add(make_sequence("chatter", priority=1, max_tokens=1))
    assert names(step(scheduler)[0]) == [("chatter", 0, 5)]
    assert names(step(scheduler)[0]) == [("warm", 32, 32)]


def test_warming_takes_no_place_in_the_queue() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1, max_queue=0)
    scheduler.add(make_sequence("warm", 70, prefill_only=True))
    scheduler.add(make_sequence("a"))
    with pytest.raises(QueueFull):
        scheduler.add(make_sequence("warm too", 70, prefill_only=True))


def test_a_pinned_prompt_survives_what_comes_after() -> None:
    scheduler = make_scheduler(num_blocks=4, prefill_chunk=64)
    scheduler.add(make_sequence("warm", 2 * BLOCK, prefill_only=True, pin=True))
    for number in range(5):
        scheduler.add(make_sequence(str(number), 3 * BLOCK, first=100 * number + 100, max_tokens=1))
        run_out(scheduler)
    scheduler.add(make_sequence("a", 2 * BLOCK + 3))
    assert names(step(scheduler)[0]) == [("a", 2 * BLOCK, 3)]
    scheduler.forget(BASE.digest)
    scheduler.add(make_sequence("b", 2 * BLOCK + 3))
    assert names(step(scheduler)[0])[-1] == ("b", 0, 2 * BLOCK + 3)


def test_a_pin_without_room_is_refused_and_leaves_nothing() -> None:
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(SettingError, match=f"{2 * BLOCK} tokens"):
        scheduler.add(make_sequence("warm", 3 * BLOCK, prefill_only=True, pin=True))
    assert not scheduler.has_work


# Weights of one's own


def own_weights(digest: str = "12" * 32) -> SubNetwork:
    return SubNetwork("x", FFNShape(1, 8, 4), Mask.from_kept_indices([[0, 1]], 8), attached=(("full", digest),))


class Loads:
    """What is loaded when a test says so."""

    def __init__(self) -> None:
        self.state = "loading"

    def __call__(self, digest: str) -> str:
        return self.state


def test_a_request_waits_for_its_own_weights_and_others_go_ahead() -> None:
    loads = Loads()
    scheduler = make_scheduler(max_num_seqs=1, loading=loads)
    own = own_weights()
    scheduler.add(make_sequence("own", own=own))
    assert scheduler.needed == {own.digest: own}
    scheduler.add(make_sequence("a"))
    batch, _ = step(scheduler)
    assert names(batch) == [("a", 0, 5)]
    loads.state = "loaded"
    run_out(scheduler)
    scheduler.add(make_sequence("own again", own=own))
    assert names(step(scheduler)[0]) == [("own again", 0, 5)]
    assert scheduler.needed == {own.digest: own}
    run_out(scheduler)
    assert scheduler.needed == {}


def test_nothing_runs_while_all_wait_for_their_weights() -> None:
    scheduler = make_scheduler(loading=Loads())
    scheduler.add(make_sequence("own", own=own_weights()))
    batch, outputs = step(scheduler)
    assert (batch.chunks, outputs, scheduler.has_work) == ((), [], True)


def test_weights_that_do_not_come_in_time_end_the_request() -> None:
    clock = Clock()
    scheduler = make_scheduler(clock=clock, loading=Loads(), load_timeout_s=30.0)
    scheduler.add(make_sequence("first", own=own_weights()))
    clock.now = 20.0
    scheduler.add(make_sequence("second", own=own_weights()))
    assert step(scheduler)[1] == []
    clock.now = 30.0
    (ended,) = step(scheduler)[1]
    assert (ended.request_id, ended.finish_reason) == ("first", "unloaded")
    assert list(scheduler.needed) == [own_weights().digest]
    clock.now = 50.0
    assert [output.request_id for output in step(scheduler)[1]] == ["second"]
    assert not scheduler.has_work


def test_weights_that_cannot_be_loaded_end_their_requests_at_once() -> None:
    loads = Loads()
    scheduler = make_scheduler(loading=loads)
    scheduler.add(make_sequence("own", own=own_weights()))
    scheduler.add(make_sequence("a"))
    loads.state = "failed"
    outputs = {output.request_id: output.finish_reason for output in step(scheduler)[1]}
    assert outputs == {"own": "unloaded", "a": None}


def test_a_request_that_runs_or_waits_for_a_slot_is_not_late() -> None:
    clock, loads = Clock(), Loads()
    loads.state = "loaded"
    scheduler = make_scheduler(max_num_seqs=1, clock=clock, loading=loads)
    for name in "ab":
        scheduler.add(make_sequence(name, own=own_weights()))
    step(scheduler)
    clock.now = 1000.0
    ended = {output.request_id: output.finish_reason for output in run_out(scheduler) if output.finish_reason}
    assert ended == {"a": "length", "b": "length"}


def test_a_cancelled_request_needs_its_weights_no_more() -> None:
    scheduler = make_scheduler(loading=Loads())
    scheduler.add(make_sequence("own", own=own_weights()))
    scheduler.cancel("own")
    assert scheduler.needed == {}
    assert not scheduler.has_work
