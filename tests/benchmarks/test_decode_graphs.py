"""The benchmark of decode graphs: what it says without a GPU, and its measuring, with a stand-in for the capture."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import decode_graphs
import pytest
import torch

from masquerade_engine import Engine, EngineSettings, load_base, runner
from masquerade_engine.decode_graphs import Step


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["decode_graphs.py"])
    assert decode_graphs.main() == 2
    said = capsys.readouterr()
    assert said.err == decode_graphs.NO_GPU + "\n"
    assert not said.out


def test_eager_steps_and_graphs_are_measured_in_turn(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []

    def keep(step: Step) -> Step:
        def replay() -> None:
            replays.append(step)
            step()

        return replay

    monkeypatch.setattr(runner, "graph_capture", lambda _: keep)
    base = load_base(str(tiny_base_dir), cache_dir=tmp_path, dtype="fp32", device="cpu")
    options = argparse.Namespace(context=20, steps=4, rounds=2, num_tokens=40)
    with Engine(base, EngineSettings(max_num_seqs=3, max_model_len=100, pack_cache_bytes=0)) as engine:
        line = decode_graphs.measure(engine, "mixed", 3, options)
        assert len(replays) >= 2 * 4 + 1  # of two rounds, and one of the warm-up
    assert re.fullmatch(r"\| mixed \| 3 \| dense( \| \d+\.\d\d){2}( \| \d+){2} \| \d+\.\d\d \|", line)
