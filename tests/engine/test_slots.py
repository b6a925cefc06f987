from __future__ import annotations

from masquerade_engine.sequence import Trim
from masquerade_engine.slots import Slots


def test_the_lowest_free_slot_is_taken() -> None:
    slots = Slots(3, num_kept=10)
    assert [slots.take(), slots.take(), slots.take()] == [0, 1, 2]
    assert slots.num_free == 0
    for slot in (2, 0):
        slots.leave(slot, 5)
    assert [slots.take(), slots.take()] == [0, 2]


def test_memory_beyond_what_is_kept_is_trimmed_once() -> None:
    slots = Slots(2, num_kept=10)
    slots.leave(slots.take(), 100)
    slots.leave(slots.take(), 5)  # a shorter one in the same slot
    slots.leave(slots.take(), 10)
    assert slots.trims() == (Trim(0, 10, 100),)
    assert slots.trims() == ()
    slots.leave(slots.take(), 30)
    assert slots.trims() == (Trim(0, 10, 30),)
