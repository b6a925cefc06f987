"""Personas by name or file, sculpted once in a work directory that benchmarks share."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from masquerade_engine.base import Base
from masquerade_masks import Mask
from masquerade_pruner import Progress, SculptResult, SculptSpec, sculpt
from masquerade_pruner.examples import Example
from masquerade_pruner.workdir import saved_examples

Personas = list[tuple[str, str, str]]  # id, name, text


@dataclass(frozen=True, slots=True)
class Material:
    """What a sculpt learned from and was measured on."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    mask: torch.Tensor  # [layers, intermediate] fp32: what it learned


def usual_workdir(*, quick: bool) -> Path:
    """Where benchmarks share their sculpts; quick ones, whose settings would clear the others' checkpoints, apart."""
    return Path(tempfile.gettempdir()) / ("masquerade-quick" if quick else "masquerade-fidelity")


def personas(wanted: Sequence[str]) -> Personas:
    """Text files, ids of ready personas, or nothing for all of these."""
    listing = (resources.files("masquerade_pruner") / "data" / "ready.json").read_text("utf-8")
    ready = {row["id"]: (row["id"], row["name"], row["text"]) for row in json.loads(listing)}
    return [ready[one] if one in ready else _from_file(Path(one)) for one in wanted or ready]


def _from_file(file: Path) -> tuple[str, str, str]:
    return file.stem, file.stem.replace("-", " ").title(), file.read_text("utf-8").strip()


def sculpted(
    spec: SculptSpec, base: Base, workdir: Path, *, name: str | None = None, cast: Sequence[Mask] = ()
) -> SculptResult:
    """The persona's sculpt, from its checkpoints as far as there are some; all of one persona share their answers.

    Those that differ in more than their sparsity have a `name` each.
    """
    began = time.monotonic()
    folder = name or f"{spec.persona_id}-{spec.sparsity}"
    result = sculpt(
        spec,
        base,
        workdir / folder,
        answers_dir=workdir / f"{spec.persona_id}-answers",
        cache_dir=workdir / "cache",
        cast=cast,
        progress=_show(folder),
    )
    print(f"{folder}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return result


def material(result: SculptResult) -> Material:
    """A finished sculpt's examples and mask."""
    answers = result.examples_path.parent
    plain, turned, validation, test = (
        saved_examples(answers, name) for name in ("train_plain", "train_turns", "validation", "test")
    )
    mask = torch.from_numpy(result.subnetwork.mask.to_dense()).float()
    return Material([*plain, *turned], validation, test, mask)


def examples_digest(*splits: Sequence[Example]) -> str:
    """sha256 of the tokens of one split's examples, or of several."""
    return hashlib.sha256(repr([[(one.prompt, one.answer) for one in split] for split in splits]).encode()).hexdigest()


def mask_digest(mask: torch.Tensor) -> str:
    """sha256 of a dense mask, `[layers, intermediate]` fp32."""
    return hashlib.sha256(mask.numpy().tobytes()).hexdigest()


def _show(name: str) -> Callable[[Progress], None]:
    shown = [0.0]

    def show(news: Progress) -> None:
        if time.monotonic() - shown[0] > 20 or news.completed == news.total:
            shown[0] = time.monotonic()
            print(
                f"{name} {news.stage} {news.completed}/{news.total} eta {news.eta_s} loss {news.loss}",
                file=sys.stderr,
                flush=True,
            )

    return show
