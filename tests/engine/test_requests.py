from __future__ import annotations

import math
from typing import Any

import pytest

from masquerade_engine import EngineSettings, SamplingParams
from masquerade_masks import SettingError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("min_tokens", 9),
        ("logprobs", 21),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"max_tokens": 8, field: value}
    with pytest.raises(SettingError) as refused:
        SamplingParams(**arguments)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"), [("max_num_seqs", 0), ("max_model_len", 1), ("prefill_chunk", 0), ("max_queue", -1)]
)
def test_engine_bounds_are_checked(field: str, value: int) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(SettingError) as refused:
        EngineSettings(**arguments)
    assert refused.value.field == field


def test_slots_that_take_memory_as_they_fill_need_hold_one_full_sequence() -> None:
    settings = EngineSettings(max_num_seqs=4, kv_cache_bytes=1000)
    assert settings.resolve_max_model_len(800, 10, lazy_slots=True) == 100
    assert EngineSettings(max_model_len=100, kv_cache_bytes=1000).resolve_max_model_len(800, 10, lazy_slots=True) == 100
    with pytest.raises(SettingError, match="1 sequence of 101 tokens"):
        EngineSettings(max_model_len=101, kv_cache_bytes=1000).resolve_max_model_len(800, 10, lazy_slots=True)


def test_the_context_is_what_the_base_and_the_memory_allow() -> None:
    settings = EngineSettings(max_num_seqs=4, kv_cache_bytes=4 * 100 * 10)
    assert settings.resolve_max_model_len(80, 10, lazy_slots=False) == 80
    assert settings.resolve_max_model_len(800, 10, lazy_slots=False) == 100
    with pytest.raises(SettingError, match="kv_cache_bytes"):
        EngineSettings(max_num_seqs=4, max_model_len=101, kv_cache_bytes=4000).resolve_max_model_len(
            800, 10, lazy_slots=False
        )
    with pytest.raises(SettingError, match="max_model_len"):
        EngineSettings(max_model_len=900).resolve_max_model_len(800, 10, lazy_slots=False)
