from __future__ import annotations

from typing import Any

import pytest

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams, TokenOutput
from masquerade_engine.scheduler import Scheduler, SchedulerLimits
from masquerade_engine.sequence import Batch, SampledToken, Sequence
from masquerade_masks import ContextTooLong, QueueFull, SettingError

STOP = 0
BASE = PersonaFunction("base:x", "cast")


def make_scheduler(num_blocks: int = 0, **limits: int) -> Scheduler:
    defaults = {"max_num_seqs": 2, "max_model_len": 100, "prefill_chunk": 32, "max_queue": 4}
    return Scheduler(SchedulerLimits(**(defaults | limits)), PrefixIndex(num_blocks), frozenset({STOP}), lambda: 0.0)


def make_sequence(name: str, num_prompt: int = 5, *, priority: int = 0, **sampling: Any) -> Sequence:
    parameters = SamplingParams(**({"max_tokens": 3} | sampling))
    request = Request(name, tuple(range(1, num_prompt + 1)), BASE, parameters, priority)
    return Sequence(request, Detokenizer(lambda tokens: "".join(chr(96 + t) for t in tokens), parameters.stop))


def step(scheduler: Scheduler, token_id: int = 1) -> tuple[Batch, list[TokenOutput]]:
    batch = scheduler.next_batch()
    return batch, scheduler.commit(batch, [SampledToken(token_id) for _ in batch.sampling])


def names(batch: Batch) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.num_tokens) for chunk in batch.chunks]


def run_out(scheduler: Scheduler) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while scheduler.num_running + scheduler.num_waiting:
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
    batch, _ = step(scheduler)
    assert [(chunk.sequence.request.id, chunk.sequence.slot) for chunk in batch.chunks] == [("a", 0), ("b", 1)]
    assert scheduler.num_waiting == 1
    batch, _ = step(scheduler)
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


@pytest.mark.parametrize("bad", [{"name": "a"}, {"name": "b", "num_prompt": 0}, {"name": "b", "priority": 2}])
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
    assert names(step(scheduler)[0]) == [("a", 32, 1), ("b", 16, 16), ("c", 16, 16)]


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
