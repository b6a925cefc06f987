"""The other end of `peers.py`: one engine in a process of its own, idle until it is asked for a run.

Lines of JSON on standard input and output. A worker says first `{"ready": ...}` or `{"absent": why}`; then it answers
each run with what came of it. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from masquerade_engine.threads import available_cores


@dataclass(frozen=True, slots=True)
class Run:
    """One batch: all prompts arrive at once, and each gets exactly `num_tokens`."""

    kind: str  # which of the engine's own modes; peers have one
    prompts: list[list[int]]
    personas: list[int]  # of each prompt
    num_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    seed: int
    warmed: bool  # the persona's prompt has been computed before

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run, in seconds from its start."""

    seconds: float
    moments: list[list[float]]  # of each token, by prompt
    num_prompt_tokens: int
    num_cached_tokens: int
    packs: str = ""  # what the personas ran on, where the engine has a choice

    @classmethod
    def of(
        cls, run: Run, started: float, moments: list[list[float]], num_cached_tokens: int = 0, packs: str = ""
    ) -> Result:
        """From `time.perf_counter` moments, now that the run is over."""
        seconds = time.perf_counter() - started
        for tokens in moments:
            assert len(tokens) == run.num_tokens, f"{len(tokens)} of {run.num_tokens} tokens came"
        relative = [[moment - started for moment in tokens] for tokens in moments]
        return cls(seconds, relative, run.num_prompt_tokens, num_cached_tokens, packs)


def serve(open_engine: Callable[[dict[str, Any]], Callable[[Run], Result]]) -> None:
    """Open the engine with this worker's settings (JSON, the only argument) and answer runs until the input ends.

    An `ImportError` while opening is said to be the reason why the engine is absent.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries
    import torch  # noqa: PLC0415  (after what the engine's module sets for OpenMP)

    torch.set_num_threads(available_cores())
    try:
        run = open_engine(json.loads(sys.argv[1]))
    except ImportError as missing:
        print(json.dumps({"absent": str(missing)}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(asdict(run(Run(**json.loads(line))))), file=answers)
