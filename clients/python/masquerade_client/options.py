"""Optional arguments of more than one call, each written once. What is left out is the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class SculptOptions(TypedDict, total=False):
    """How a persona is sculpted."""

    sparsity: float  # share of FFN neurons to drop, in (0, 0.9]
    preset: Literal["smoke", "default", "thorough"]
    recovery: Literal["none", "vectors", "lora", "full"]
    teacher: Literal["base", "remote"]
    seed: int


class Sampling(TypedDict, total=False):
    """How a reply is sampled; the meanings are those of OpenAI's API and, where it has none, vLLM's."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: str | Sequence[str]
    min_tokens: int
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    priority: int  # 0: a player waits; 1: ambient chatter
    n: int  # answers to one prompt, 1 to 16
    deadline_s: float  # seconds to the first token, or the call fails; after it the reply ends there
    truncation: Literal["disabled", "auto"]  # auto: drop the oldest turns of a conversation that is too long


def checked(kind: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without its Nones. Raises TypeError for an option `kind` does not know."""
    known = kind.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known are {', '.join(sorted(known))}")
    return {name: value for name, value in given.items() if value is not None}
