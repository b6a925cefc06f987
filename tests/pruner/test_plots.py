from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from masquerade_masks import Mask, SettingError
from masquerade_pruner import plots


def masks(count: int) -> dict[str, Mask]:
    order = np.random.default_rng(0).random((count, 3, 96)).argsort(axis=2)
    return {f"p{index}": Mask.from_kept_indices(one[:, :64], 96) for index, one in enumerate(order)}


def test_every_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = {
        "loss": [1.0, 0.8, 0.7],
        "validation_kl": [[0, 0.9], [3, 0.5]],
        "best_step": 3,
        "baseline_kl": {"wanda": 0.95},
    }
    kl = {"mean": 0.4, "low": 0.3, "high": 0.5}
    drawn = [
        plots.plot_learning(history, tmp_path / "learning.png"),
        plots.plot_kept("p0", masks(3), tmp_path / "kept.png"),
        plots.plot_overlap(masks(3), tmp_path / "overlap.png"),
        plots.plot_quality(
            [plots.VersionQuality(1, 0.25, kl, 0.6), plots.VersionQuality(2, 0.5, kl)], tmp_path / "quality.png"
        ),
    ]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingError, match=r"pip install 'masquerade\[eval\]'"):
        plots.require_matplotlib()
