from __future__ import annotations

from masquerade_engine.residency import ResidencyPolicy


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_policy(budget: int) -> tuple[ResidencyPolicy, Clock]:
    clock = Clock()
    return ResidencyPolicy(budget, clock), clock


def test_what_fits_drives_nothing_out() -> None:
    policy, _ = make_policy(100)
    policy.touch("a")
    assert policy.victims("a", 40, {"b": 60}) == []


def test_what_never_fits_stays_out() -> None:
    policy, _ = make_policy(100)
    policy.touch("a")
    assert policy.victims("a", 101, {}) is None


def test_a_busier_persona_drives_out_the_idlest() -> None:
    policy, _ = make_policy(100)
    for _ in range(4):
        policy.touch("new")
    policy.touch("idle")
    for _ in range(9):
        policy.touch("busy")
    assert policy.victims("new", 50, {"busy": 50, "idle": 50}) == ["idle"]


def test_equals_do_not_chase_each_other() -> None:
    policy, _ = make_policy(50)
    policy.touch("a")
    policy.touch("b")
    assert policy.victims("b", 50, {"a": 50}) is None


def test_busyness_fades() -> None:
    policy, clock = make_policy(50)
    for _ in range(8):
        policy.touch("yesterday")
    clock.now = 3600.0
    policy.touch("today")
    assert policy.victims("today", 50, {"yesterday": 50}) == ["yesterday"]


def test_the_memory_of_uses_is_bounded() -> None:
    policy, clock = make_policy(50)
    for i in range(10_000):
        clock.now = float(i)
        policy.touch(str(i))
    assert len(policy._uses) <= 4097
    assert policy.busyness("9999") > 0
