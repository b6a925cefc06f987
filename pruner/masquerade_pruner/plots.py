"""Plots of a sculpt and of an evaluation, as PNG files. matplotlib is optional and imported when something is drawn."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from masquerade_masks import Mask, SettingError, chance_jaccard

MISSING = "matplotlib is not installed: pip install 'masquerade[eval]'"
_INCHES = (7.0, 4.2)
_DPI = 150


@dataclass(frozen=True, slots=True)
class VersionQuality:
    """One version's figures on the test split."""

    version: int
    sparsity: float
    kl: Mapping[str, float]  # mean, low, high
    baseline_kl: float | None = None  # the strongest baseline's of the same size


def require_matplotlib() -> None:
    """Raise `SettingError` where matplotlib is not installed."""
    _figure_class()


def plot_learning(history: Mapping[str, Any], path: Path) -> Path:
    """A sculpt's loss by step, its validation KL, and the baselines it began above."""
    figure, axes = _axes("step", "nats a token", "learning the mask")
    losses = history["loss"]
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=1, label="training loss")
    steps, values = zip(*history["validation_kl"], strict=True)
    axes.plot(steps, values, marker="o", label="validation KL")
    axes.axvline(history["best_step"], color="0.5", linestyle=":", label=f"kept: step {history['best_step']}")
    for index, (name, value) in enumerate(history.get("baseline_kl", {}).items()):
        axes.axhline(value, color=f"C{index + 1}", linestyle="--", linewidth=1, label=name)
    axes.legend()
    return _save(figure, path)


def plot_kept(name: str, masks: Mapping[str, Mask], path: Path) -> Path:
    """The kept fraction of every layer of `name`'s mask, and how much of it each other mask keeps as well."""
    own = masks[name].to_dense()  # [layers, intermediate]
    figure, axes = _axes("layer", "fraction of FFN neurons", f"neurons that {name} keeps")
    layers = np.arange(len(own))
    axes.bar(layers, own.mean(axis=1), color="0.85", label="kept")
    for other, mask in masks.items():
        if other != name:
            axes.plot(layers, (own & mask.to_dense()).mean(axis=1), marker=".", label=f"kept by {other} too")
    axes.set_ylim(0, 1)
    axes.legend()
    return _save(figure, path)


def plot_overlap(masks: Mapping[str, Mask], path: Path) -> Path:
    """Pairwise Jaccard of several personas' masks; a line in the colour bar marks what unrelated masks would have."""
    names = list(masks)
    overlap = np.array([[masks[one].jaccard(masks[other]) for other in names] for one in names])
    figure, axes = _axes("", "", "overlap of masks (Jaccard)")
    image = axes.imshow(overlap, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, values in enumerate(overlap):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    bar = figure.colorbar(image)
    kept = round(float(np.mean([mask.kept for mask in masks.values()])))
    chance = chance_jaccard(kept, masks[names[0]].intermediate_size)
    bar.ax.axhline(chance, color="red")
    bar.ax.set_title(f"chance {chance:.2f}", color="red", fontsize="small")
    return _save(figure, path)


def plot_quality(versions: Sequence[VersionQuality], path: Path) -> Path:
    """KL to the dense persona against sparsity, one point a version, with its interval and its baseline."""
    figure, axes = _axes("sparsity", "KL to dense, nats a token", "quality against sparsity")
    means = np.array([one.kl["mean"] for one in versions])
    spans = np.array([[one.kl["mean"] - one.kl["low"], one.kl["high"] - one.kl["mean"]] for one in versions]).T
    sparsities = [one.sparsity for one in versions]
    axes.errorbar(sparsities, means, yerr=np.maximum(spans, 0), fmt="o", capsize=3, label="sculpted")
    for one in versions:
        axes.annotate(f"v{one.version}", (one.sparsity, one.kl["mean"]), xytext=(6, 4), textcoords="offset points")
    rivals = [(one.sparsity, one.baseline_kl) for one in versions if one.baseline_kl is not None]
    if rivals:
        axes.plot(*zip(*rivals, strict=True), "x", color="C1", label="strongest baseline")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def _axes(x_label: str, y_label: str, title: str) -> tuple[Any, Any]:
    figure = _figure_class()(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path


def _figure_class() -> Any:
    """`Figure` itself, not pyplot: nothing global, and no display is looked for."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise SettingError("plots", MISSING) from error
