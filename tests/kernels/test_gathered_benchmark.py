from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gathered_ffn.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gathered_ffn_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_interpreter_checks_a_tiny_shape() -> None:
    done = run("--interpret")
    assert done.returncode == 0, done.stderr
    assert "4 personas, 18 tokens" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("gathered_ffn.py measures a CUDA GPU, and torch finds none here")
    assert not done.stdout


def test_masks_of_high_overlap_stay_in_their_pool(script: ModuleType) -> None:
    rng = script.np.random.default_rng(0)
    masks = script.masks(script.Case("3b", 0.5, "high", 16, 16), 8192, rng)
    assert (masks.sum(axis=1) == 4096).all()
    assert masks.any(axis=0).mean() == pytest.approx(0.65, abs=0.001)
    chance = script.masks(script.Case("3b", 0.5, "chance", 4, 16), 8192, rng)
    assert chance.any(axis=0).mean() == pytest.approx(1 - 0.5**4, abs=0.02)


def test_the_report_says_where_gathering_stops_to_pay(script: ModuleType) -> None:
    def result(union: float, gathered: float, personas: int) -> object:
        timings = (script.Timing.of([time]) for time in (gathered, 40.0, 42.0))
        case = script.Case("3b", 0.5, "chance" if personas > 1 else "one", personas, 16)
        return script.Result(case, union, *timings, weight_rate=2.7e12, copy_rate=3e12)

    results = [result(0.5, 22.0, 1), result(0.75, 32.0, 2), result(0.94, 43.0, 4), result(1.0, 45.0, 16)]
    assert list(script.thresholds(results)) == [
        "- Llama-3.2-3B, 16 tokens: gathered up to a union of 75%; the dense pack from 94%"
    ]
    solo, mixed = script.goals(results)
    assert "90% of the copy's bandwidth" in solo
    assert "1.05 times dense at most" in mixed  # 42 over 40: the dense pack is chosen where gathering is slower
    assert script.row(results[2]).endswith("| 1.07 | dense pack | 1.05 |")
