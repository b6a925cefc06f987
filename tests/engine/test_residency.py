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
    assert policy.victims(["a"], 40, {"b": (["b"], 60)}) == []


def test_what_never_fits_stays_out() -> None:
    policy, _ = make_policy(100)
    policy.touch("a")
    assert policy.victims(["a"], 101, {}) is None


def test_a_busier_persona_drives_out_the_idlest() -> None:
    policy, _ = make_policy(100)
    for _ in range(4):
        policy.touch("new")
    policy.touch("idle")
    for _ in range(9):
        policy.touch("busy")
    assert policy.victims(["new"], 50, {"busy": (["busy"], 50), "idle": (["idle"], 50)}) == ["idle"]


def test_equals_do_not_chase_each_other() -> None:
    policy, _ = make_policy(50)
    policy.touch("a")
    policy.touch("b")
    assert policy.victims(["b"], 50, {"a": (["a"], 50)}) is None


def test_what_is_needed_never_goes_and_what_must_come_needs_not_be_busy() -> None:
    policy, _ = make_policy(100)
    for _ in range(9):
        policy.touch("busy")
    resident = {"busy": (["busy"], 50), "needed": (["needed"], 50)}
    assert policy.victims(["new"], 50, resident, needed={"needed"}) is None
    assert policy.victims(["new"], 50, resident, needed={"needed"}, must=True) == ["busy"]
    assert policy.victims(["new"], 60, resident, needed={"needed"}, must=True) is None


def test_busyness_fades() -> None:
    policy, clock = make_policy(50)
    for _ in range(8):
        policy.touch("yesterday")
    clock.now = 3600.0
    policy.touch("today")
    assert policy.victims(["today"], 50, {"yesterday": (["yesterday"], 50)}) == ["yesterday"]


def test_the_memory_of_uses_is_bounded() -> None:
    policy, clock = make_policy(50)
    for i in range(10_000):
        clock.now = float(i)
        policy.touch(str(i))
    assert len(policy._uses) <= 4097
    assert policy.busyness(["9999"]) > 0


def test_a_cast_is_as_busy_as_its_members_together() -> None:
    policy, _ = make_policy(100)
    for digest in "aabbbc":
        policy.touch(digest)
    assert policy.busyness("ab") == 5
    assert policy.victims("ab", 60, {"c": ("c", 60)}) == ["c"]


def test_a_cast_unites_those_whose_masks_overlap() -> None:
    policy, _ = make_policy(100)
    for digest in "abcd":
        policy.touch(digest)
    assert policy.cast_members("abcd", lambda members: 0.5 + 0.05 * len(members)) == list("abcd")
    assert policy.cast_members("a", lambda members: 0.5) == []


def test_a_union_of_nearly_everything_is_no_pack() -> None:
    policy, _ = make_policy(100)
    for digest in "abcd":
        policy.touch(digest)
    assert policy.cast_members("abcd", lambda members: 0.5 if len(members) == 1 else 0.95) == []
    # Three of four equally busy ones fit: a quarter of the requests would go elsewhere.
    assert policy.cast_members("abcd", lambda members: 0.6 if len(members) < 4 else 0.95) == []


def test_a_rarely_seen_member_does_not_keep_a_cast_from_its_pack() -> None:
    policy, _ = make_policy(100)
    for digest in ["a"] * 20 + ["b"] * 20 + ["rare"]:
        policy.touch(digest)
    found = policy.cast_members({"a", "b", "rare"}, lambda members: 0.95 if "rare" in members else 0.7)
    assert sorted(found) == ["a", "b"]
