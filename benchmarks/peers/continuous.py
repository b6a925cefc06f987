"""transformers' continuous batching, its prefix cache on: one manager for greedy runs and one for sampled ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from generate import generation_config
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from worker import Result, Run, serve


class CountedPrefixes:
    """Counts what the manager's prefix cache finds."""

    def __init__(self, manager: Any) -> None:
        self.num_tokens = 0
        cache = manager.batch_processor.cache
        assert cache.use_prefix_sharing
        self._search = cache.search_prefix_match
        cache.search_prefix_match = self._count

    def _count(self, *arguments: Any, **more: Any) -> int:
        found: int = self._search(*arguments, **more)
        self.num_tokens += found
        return found


def open_engine(settings: dict[str, Any]) -> Callable[[Run], Result]:
    """The dense model in bf16 behind managers that stay open between runs."""
    chosen = settings["engine"]
    model = AutoModelForCausalLM.from_pretrained(
        settings["path"], dtype=getattr(torch, chosen["dtype"]), attn_implementation=chosen["attention"]
    ).eval()
    page_size = chosen["page_size"]
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=chosen["cache_tokens"] // page_size,
        max_batch_tokens=chosen["max_batch_tokens"],
        scheduler_type=chosen["scheduler"],
    )
    managers: dict[tuple[float, float], tuple[Any, CountedPrefixes]] = {}

    def run(asked: Run) -> Result:
        how = (asked.temperature, asked.top_p)
        if how not in managers:
            sampling = generation_config(asked.num_tokens, *how, eos_token_id=-1)
            manager = model.init_continuous_batching(sampling, config)
            manager.warmup()  # makes the cache
            manager.start()
            managers[how] = manager, CountedPrefixes(manager)
        manager, prefixes = managers[how]
        found_before = prefixes.num_tokens
        started = time.perf_counter()
        names = manager.add_requests(asked.prompts, max_new_tokens=asked.num_tokens, record_timestamps=True)
        moments: dict[str, list[float]] = {}
        while len(moments) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                moments[result.request_id] = result.timestamps
            assert manager.is_running(), "its thread has ended"
        return Result.of(asked, started, [moments[name] for name in names], prefixes.num_tokens - found_before)

    return run


if __name__ == "__main__":
    serve(open_engine)
