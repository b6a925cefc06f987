"""Characters and masks of the benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
from town import QUESTION_TOKENS, character, overlapping_subnetworks, prompt, random_subnetwork, union_share

from masquerade_engine import load_base


@pytest.fixture(scope="module")
def base(tiny_base_dir: Any) -> Any:
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32")


def test_masks_keep_their_share_and_overlap_as_asked(base: Any) -> None:
    masks = overlapping_subnetworks(base, 0.5, 0.35, 16, seed=0)
    assert len({one.digest for one in masks}) == 16
    assert {one.mask.kept for one in masks} == {random_subnetwork(base, 0.5, 0).mask.kept}
    together, apart = union_share(masks), union_share([random_subnetwork(base, 0.5, seed) for seed in range(16)])
    assert together == pytest.approx(0.65, abs=0.02)
    assert apart > 0.99
    assert union_share(masks[:1]) == pytest.approx(masks[0].mask.kept / base.shape.intermediate_size)


@pytest.mark.real_model
def test_prompts_have_their_length_and_differ_from_the_start(bundled_base: Any) -> None:
    def count(text: str) -> int:
        return len(bundled_base.tokenizer(text, add_special_tokens=False)["input_ids"])

    ones = [character(bundled_base, seed) for seed in range(20)]
    assert len({one.name for one in ones}) == 20
    assert all(168 <= count(one.system_prompt) <= 172 for one in ones)
    tokens = prompt(bundled_base, ones[0], "a")
    other = prompt(bundled_base, ones[0], "b")
    assert len(tokens) == len(other)
    assert 170 + QUESTION_TOKENS <= len(tokens) <= 170 + QUESTION_TOKENS + 20  # and the template's own
    shared = next(place for place, pair in enumerate(zip(tokens, other, strict=True)) if pair[0] != pair[1])
    assert shared >= 170
