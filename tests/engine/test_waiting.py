from __future__ import annotations

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.requests import PersonaFunction, Request, SamplingParams
from masquerade_engine.sequence import Sequence
from masquerade_engine.waiting import WaitingQueue


def make_sequence(name: str) -> Sequence:
    """The first letter is the cast."""
    function = PersonaFunction("digest", name[0])
    return Sequence(Request(name, (1,), function, SamplingParams(max_tokens=1)), Detokenizer(lambda ids: ""))


def make_queue(*names: str) -> tuple[WaitingQueue, dict[str, Sequence]]:
    queue, sequences = WaitingQueue(), {name: make_sequence(name) for name in names}
    for sequence in sequences.values():
        queue.append(sequence)
    return queue, sequences


def take_all(queue: WaitingQueue) -> list[str]:
    taken = []
    while (sequence := queue.first(lambda _: True)) is not None:
        queue.take(sequence)
        taken.append(sequence.request.id)
    return taken


def test_casts_take_turns() -> None:
    queue, _ = make_queue("a1", "a2", "b1", "a3", "c1", "b2")
    assert len(queue) == 6
    assert take_all(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(queue) == 0


def test_who_is_passed_over_keeps_its_place_and_its_casts_turn() -> None:
    queue, sequences = make_queue("a1", "a2", "b1", "c1")
    first = queue.first(lambda sequence: sequence.request.id not in {"a1", "a2"})
    assert first is sequences["b1"]
    queue.take(first)
    assert take_all(queue) == ["a1", "c1", "a2"]


def test_who_had_a_turn_already_goes_before_everybody() -> None:
    queue, _ = make_queue("a1", "b1", "b2", "c1")
    queue.put_back(make_sequence("c0"))
    queue.put_back(make_sequence("b0"))
    assert take_all(queue) == ["b0", "c0", "a1", "b1", "c1", "b2"]


def test_one_may_leave_from_anywhere() -> None:
    queue, sequences = make_queue("a1", "a2", "b1")
    queue.remove(sequences["a2"])
    queue.remove(sequences["b1"])
    assert [sequence.request.id for sequence in queue] == ["a1"]
    queue.append(sequences["b1"])
    assert take_all(queue) == ["a1", "b1"]
