from __future__ import annotations

import random

import pytest

from masquerade_kernels.planner import PackFacts, RowCosts, Run, Segment, plan_step

# Reading the weights takes 100, and rows are free up to 16; then each takes 4.
COSTS = RowCosts(((1, 100.0), (16, 100.0), (64, 292.0)), per_segment=5.0)


def compact(*personas: str, fraction: float = 0.5) -> dict[str, PackFacts]:
    return {persona: PackFacts(frozenset(persona), fraction) for persona in personas}


def cast(members: str, fraction: float) -> dict[str, PackFacts]:
    return {f"cast:{members}": PackFacts(frozenset(members), fraction)}


def test_costs_are_read_between_the_points_and_beyond_the_last() -> None:
    assert [COSTS(rows) for rows in (0, 1, 8, 16, 40, 64, 88)] == [0, 100, 100, 100, 196, 292, 388]


def test_packs_of_other_kernels_have_costs_of_their_own() -> None:
    costs = RowCosts(COSTS.points, 5.0, gathered=((1, 90.0), (64, 900.0)))
    half = PackFacts(frozenset("a"), 0.5)
    assert [costs.on(pack, 64) for pack in (None, half)] == [292, 450]
    assert COSTS.on(half, 64) == 146
    assert plan_step([Run("a", 1)], {"a": half}, costs) == (Segment("a", (0,)),)
    assert plan_step([Run("a", 64)], {"a": half}, costs) == (Segment(None, (0,)),)


def test_a_step_of_one_resident_persona_runs_compact() -> None:
    assert plan_step([Run("a", 1), Run("a", 1), Run("a", 7)], compact("a"), COSTS) == (Segment("a", (0, 1, 2)),)


def test_a_step_of_one_persona_without_a_pack_runs_dense() -> None:
    assert plan_step([Run("a", 500)], {}, COSTS) == (Segment(None, (0,)),)


def test_a_step_of_the_base_runs_dense() -> None:
    assert plan_step([Run(None, 1), Run(None, 90)], compact("a"), COSTS) == (Segment(None, (0, 1)),)


def test_few_mixed_decodes_share_the_dense_pack() -> None:
    runs = [Run("a", 1), Run("b", 1), Run(None, 1)]
    assert plan_step(runs, compact("a", "b"), COSTS) == (Segment(None, (0, 1, 2)),)


def test_two_personas_part_where_two_compact_reads_are_cheaper_than_one_dense() -> None:
    runs = [Run("a", 1), Run("b", 1)]
    assert plan_step(runs, compact("a", "b", fraction=0.5), COSTS) == (Segment(None, (0, 1)),)
    assert plan_step(runs, compact("a", "b", fraction=0.4), COSTS) == (Segment("a", (0,)), Segment("b", (1,)))


def test_a_cast_runs_on_its_own_pack() -> None:
    runs = [Run(persona, 1) for persona in "abca"]
    resident = compact("a") | cast("abc", 0.65) | cast("abcd", 0.8)
    assert plan_step(runs, resident, COSTS) == (Segment("cast:abc", (0, 1, 2, 3)),)


def test_one_row_outside_the_cast_takes_all_to_the_dense_pack() -> None:
    runs = [Run(persona, 1) for persona in "abx"]
    assert plan_step(runs, cast("ab", 0.65), COSTS) == (Segment(None, (0, 1, 2)),)


def test_a_crowd_of_the_cast_parts_from_the_rest() -> None:
    runs = [*(Run(persona, 20) for persona in "abab"), Run("x", 1)]
    assert plan_step(runs, cast("ab", 0.5), COSTS) == (Segment(None, (4,)), Segment("cast:ab", (0, 1, 2, 3)))


def test_a_long_chunk_leaves_for_its_own_pack_and_a_short_one_rides_along() -> None:
    def runs(num_tokens: int) -> list[Run]:
        return [Run("a", 1), Run("b", 1), Run("b", num_tokens), Run("c", 3)]

    assert plan_step(runs(8), compact("b"), COSTS) == (Segment(None, (0, 1, 2, 3)),)
    assert plan_step(runs(60), compact("b"), COSTS) == (Segment(None, (0, 3)), Segment("b", (1, 2)))


def test_a_pinned_run_stays_on_the_dense_pack() -> None:
    runs = [Run("a", 1, pinned=True), Run("a", 200)]
    assert plan_step(runs, compact("a"), COSTS) == (Segment(None, (0,)), Segment("a", (1,)))


@pytest.mark.parametrize("seed", range(30))
def test_every_run_is_planned_once_on_a_pack_that_covers_it_and_never_dearer_than_dense(seed: int) -> None:
    draw = random.Random(seed)
    runs = [
        Run(draw.choice([None, *"abcdef"]), draw.choice([1, 1, 1, 5, 40, 300]), pinned=draw.random() < 0.1)
        for _ in range(draw.randrange(1, 24))
    ]
    resident = compact(*draw.sample("abcdef", 3), fraction=draw.choice([0.3, 0.5, 0.75]))
    resident |= cast("abcd", draw.choice([0.5, 0.65, 0.9])) | cast("ef", 0.6)
    segments = plan_step(runs, resident, COSTS)
    assert sorted(index for segment in segments for index in segment.runs) == list(range(len(runs)))
    cost = 0.0
    for segment in segments:
        num_rows = sum(runs[index].num_tokens for index in segment.runs)
        cost += COSTS.per_segment + (1.0 if segment.pack is None else resident[segment.pack].fraction) * COSTS(num_rows)
        if segment.pack is not None:
            assert all(runs[index].persona in resident[segment.pack].members for index in segment.runs)
            assert not any(runs[index].pinned for index in segment.runs)
    assert cost <= COSTS.per_segment + COSTS(sum(run.num_tokens for run in runs))
    assert [segment.pack for segment in segments].count(None) == 0 or segments[0].pack is None


# Weights of one's own


def test_a_persona_with_weights_of_its_own_runs_on_its_own_pack_whatever_it_costs() -> None:
    runs = [Run("a", 1), Run("o", 1, own=True), Run("b", 1), Run("o", 40, own=True), Run("p", 1, own=True)]
    assert plan_step(runs, compact("o", "p") | cast("ab", 0.6), COSTS) == (
        Segment("cast:ab", (0, 2)),
        Segment("o", (1, 3)),
        Segment("p", (4,)),
    )


def test_own_weights_do_not_change_where_the_others_run() -> None:
    runs = [Run("a", 1), Run("b", 1), Run(None, 1)]
    alone = plan_step(runs, compact("a", "b", "o"), COSTS)
    assert plan_step([*runs, Run("o", 90, own=True)], compact("a", "b", "o"), COSTS) == (*alone, Segment("o", (3,)))


def test_a_reproducible_request_with_own_weights_has_but_one_pack() -> None:
    assert plan_step([Run("o", 1, pinned=True, own=True)], compact("o"), COSTS) == (Segment("o", (0,)),)


def test_a_step_of_own_weights_alone_reads_nothing_else() -> None:
    assert plan_step([Run("o", 3, own=True)], compact("a", "o"), COSTS) == (Segment("o", (0,)),)
