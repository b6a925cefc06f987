from __future__ import annotations

from masquerade_kernels.planner import MIN_COMPACT_ROWS, Run, Segment, plan_step


def test_a_step_of_one_resident_persona_runs_compact() -> None:
    runs = [Run("a", 1), Run("a", 1), Run("a", 7)]
    assert plan_step(runs, {"a"}) == (Segment("a", (0, 1, 2)),)


def test_a_step_of_one_persona_without_a_pack_runs_dense() -> None:
    assert plan_step([Run("a", 500)], set()) == (Segment(None, (0,)),)


def test_a_step_of_the_base_runs_dense() -> None:
    assert plan_step([Run(None, 1), Run(None, 90)], {"a"}) == (Segment(None, (0, 1)),)


def test_mixed_decodes_share_the_dense_pack() -> None:
    runs = [Run("a", 1), Run("b", 1), Run(None, 1)]
    assert plan_step(runs, {"a", "b"}) == (Segment(None, (0, 1, 2)),)


def test_a_long_chunk_leaves_the_dense_pack_for_its_own() -> None:
    runs = [Run("a", 1), Run("b", 1), Run("b", MIN_COMPACT_ROWS), Run("c", 3)]
    assert plan_step(runs, {"b"}) == (Segment(None, (0, 1, 3)), Segment("b", (2,)))


def test_a_short_chunk_rides_the_dense_pack() -> None:
    runs = [Run("a", 1), Run("b", MIN_COMPACT_ROWS - 1)]
    assert plan_step(runs, {"b"}) == (Segment(None, (0, 1)),)


def test_chunks_of_one_persona_count_together() -> None:
    runs = [Run("a", 1), Run("b", MIN_COMPACT_ROWS // 2), Run("b", MIN_COMPACT_ROWS // 2)]
    assert plan_step(runs, {"b"}) == (Segment(None, (0,)), Segment("b", (1, 2)))


def test_a_step_without_dense_rows_has_no_dense_segment() -> None:
    runs = [Run("a", 100), Run("b", 100)]
    assert plan_step(runs, {"a", "b"}) == (Segment("a", (0,)), Segment("b", (1,)))


def test_every_run_is_planned_once() -> None:
    runs = [Run(persona, n) for persona in ("a", "b", None) for n in (1, 40, 200)]
    for resident in ({"a"}, {"a", "b"}, set()):
        planned = [index for segment in plan_step(runs, resident) for index in segment.runs]
        assert sorted(planned) == list(range(len(runs)))
