"""How much the masks of a cast have in common: what decides whether one pack serves them all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from masquerade_masks import Mask, union


def overlap_json(cast: str, masks: Mapping[str, Mask]) -> dict[str, Any]:
    """Pairwise Jaccard beside what unrelated masks of those sizes have, and the size of the union."""
    pairs = [
        {"a": a, "b": b, "jaccard": masks[a].jaccard(masks[b]), "chance": chance(masks[a], masks[b])}
        for a, b in combinations(masks, 2)
    ]
    return {"cast": cast, "personas": list(masks), "pairs": pairs, "union": _union_json(masks)}


def chance(one: Mask, other: Mask) -> float:
    """The Jaccard index that two unrelated masks have: p q / (p + q - p q), with p, q the kept fractions."""
    p, q = 1 - one.sparsity, 1 - other.sparsity
    return p * q / (p + q - p * q)


def _union_json(masks: Mapping[str, Mask]) -> dict[str, Any] | None:
    if not masks:
        return None
    dense = union(masks.values())  # [layers, intermediate]
    kept = sum(mask.kept for mask in masks.values()) / len(masks)
    return {
        "neurons_per_layer": float(dense.sum(axis=1).mean()),
        "fraction": float(dense.mean()),
        "mean_kept_per_persona": kept,
        "intermediate_size": int(dense.shape[1]),
    }
