"""`peers.py`: what is compared with what, and what a run's answer means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peers import Absent, Measured, Target, Worker, _process, _ratio, _target_row, cells, peers, targets

FORMATS = ["none", "int8"]


def measured(tokens_per_s: float, tpot_s: float = 0.05) -> Measured:
    return Measured(tokens_per_s, 0.1, tpot_s, tpot_s, tpot_s, 0.8, "")


def test_every_cell_has_its_engine_and_every_figure_its_cells() -> None:
    keys = [cell.key for cell in cells(FORMATS)]
    assert len(keys) == len(set(keys))
    names = {peer.name for peer in peers(FORMATS)}
    assert {cell.peer for cell in cells(FORMATS)} == names
    for target in targets(FORMATS):
        assert {target.ours, target.theirs} <= set(keys), target.name


def test_both_sides_of_a_figure_run_alike() -> None:
    """The same streams, sampled alike; only `generate`, which caches nothing, stands for its own cold state."""
    by_key = {cell.key: cell for cell in cells(FORMATS)}
    for target in targets(FORMATS):
        ours, theirs = by_key[target.ours], by_key[target.theirs]
        assert (ours.streams, ours.sampled) == (theirs.streams, theirs.sampled), target.name
        assert ours.warmed == theirs.warmed or theirs.peer == "generate", target.name


def test_an_answers_figures() -> None:
    moments = [[0.5, 1.0, 1.5], [0.7, 1.0, 1.7]]  # two streams of three tokens
    found = Measured.of({"seconds": 2.0, "moments": moments, "num_prompt_tokens": 400, "num_cached_tokens": 300})
    assert found.tokens_per_s == 3.0
    assert found.ttft_s == pytest.approx(0.6)
    assert found.tpot_s == pytest.approx(0.5)
    assert found.gap_p50_s == pytest.approx(0.5)
    assert found.cached_share == 0.75


def test_ratios_pair_rounds_and_speed_between_tokens_is_the_inverse_of_its_time() -> None:
    series = {"a": [measured(200), measured(100)], "b": [measured(100), measured(50), measured(1)]}
    ratio = _ratio(Target("", "a", "b"), series)
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high) == (2.0, 2.0, 2.0)  # the round that only one of them has is left out
    slow = {"a": [measured(1, tpot_s=0.02)], "b": [measured(1, tpot_s=0.01)]}
    found = _ratio(Target("", "a", "b", by_tpot=True), slow)
    assert found is not None
    assert found.mean == 0.5


def test_a_figure_whose_lower_end_must_reach_it_is_judged_by_that() -> None:
    series = {"a": [measured(95), measured(105), measured(95), measured(105)], "b": [measured(100)] * 4}
    assert "reached" in _target_row(Target("", "a", "b", 0.99), series)
    assert "missed" in _target_row(Target("", "a", "b", 0.99, of_low_end=True), series)
    assert "not run" in _target_row(Target("", "a", "c", 0.99), series)


def test_an_engine_that_dies_is_absent_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import sys; sys.stderr.write('first\\nno such library\\n'); sys.exit(3)"
    with (
        log.open("w") as errors,
        _process([sys.executable, "-c", program], errors) as process,
        pytest.raises(Absent, match="no such library"),
    ):
        Worker(process, log).ask()
    with pytest.raises(Absent, match="not installed"), _process(["no-such-program", ""], sys.stderr):
        pass


def test_an_engine_says_why_it_is_absent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = """print('{"absent": "peft is not installed"}')"""
    with (
        log.open("w") as errors,
        _process([sys.executable, "-c", program], errors) as process,
        pytest.raises(Absent, match="peft is not installed"),
    ):
        Worker(process, log).ask()
