"""Scenes and earlier turns: a quarter of the branches carry them, so that a served conversation is familiar ground."""

from __future__ import annotations

import random
from importlib import resources


def load_scenes() -> list[str]:
    """The scene lines that ship with the project: what a game client sends as its system message."""
    text = (resources.files("masquerade_pruner") / "data" / "scenes.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line.strip()]


def contexts(rng: random.Random, count: int, share: float) -> list[int | str | None]:
    """For each of `count` branches: None (plain), a scene line, or a number of earlier turns, one to four."""
    scenes = load_scenes()
    drawn: list[int | str | None] = []
    for _ in range(count):
        if rng.random() >= share:
            drawn.append(None)
        elif rng.random() < 0.5:
            drawn.append(rng.choice(scenes))
        else:
            drawn.append(rng.randint(1, 4))
    return drawn
