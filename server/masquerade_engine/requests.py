"""What goes into the engine and what comes out: plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from masquerade_masks import SettingError, SubNetwork

if TYPE_CHECKING:
    import torch

# `unloaded`: the persona's own FFN weights could not be loaded while the request waited.
FinishReason = Literal["stop", "length", "cancelled", "error", "deadline", "unloaded"]

MAX_LOGPROBS = 20  # OpenAI's bound on top_logprobs
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    Raises `SettingError` naming the field that is out of range.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no bound
    min_p: float = 0.0  # of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report beside the chosen token

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens >= 1, "must be at least 1")
        _check("temperature", 0.0 <= self.temperature <= 100.0, "must be between 0 and 100")
        _check("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1")
        _check("top_k", self.top_k >= 0, "must be 0 (no bound) or more")
        _check("min_p", 0.0 <= self.min_p <= 1.0, "must be between 0 and 1")
        _check("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "must be a finite number above 0")
        _check("presence_penalty", math.isfinite(self.presence_penalty), "must be finite")
        _check("frequency_penalty", math.isfinite(self.frequency_penalty), "must be finite")
        _check("stop", len(self.stop) <= MAX_STOP_STRINGS, f"must hold at most {MAX_STOP_STRINGS} strings")
        _check("stop", all(self.stop), "must hold no empty string")
        _check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "must be between 0 and max_tokens")
        _check(
            "logprobs",
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"must be between 0 and {MAX_LOGPROBS}",
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class PersonaFunction:
    """What a request is computed by: one sub-network, or the unpruned base."""

    digest: str  # of everything that changes the function; "base:<fingerprint>" for the base
    cast: str  # namespace for KV: nothing is shared across casts
    subnetwork: SubNetwork | None = None  # None: the unpruned base

    @property
    def has_own_ffn(self) -> bool:
        """Whether it has FFN weights of its own, which must be loaded before it runs."""
        return self.subnetwork is not None and self.subnetwork.has_own_ffn


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: `prompt` under `function`, sampled by `sampling`."""

    id: str
    prompt: tuple[int, ...]
    function: PersonaFunction
    sampling: SamplingParams
    priority: int = 0  # 0: a player waits; 1: ambient chatter
    # Seconds from `Engine.add`. Passed before the first token: ends with `deadline`; after it: with `length`.
    deadline_s: float | None = None
    prefill_only: bool = False  # end, with no token, once the prompt's whole blocks are in the prefix cache
    pin: bool = False  # and keep those blocks from eviction until the function is forgotten
    return_hidden_states: bool = False  # with every token, what the head read to give its distribution


def warm_request(request_id: str, function: PersonaFunction, prompt: tuple[int, ...], *, pin: bool = False) -> Request:
    """A request that brings a prompt into the prefix cache, behind everybody else."""
    return Request(request_id, prompt, function, SamplingParams(max_tokens=1), priority=1, prefill_only=True, pin=pin)


@dataclass(frozen=True, slots=True)
class Warmed:
    """What warming a prompt found."""

    num_prompt_tokens: int
    num_cached_tokens: int  # of these, in the prefix cache before


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step's news of one request. `finish_reason` is None until the last."""

    request_id: str
    token_id: int | None  # None where a request ends without a new token
    text: str  # safe to stream: never part of a stop string or of an unfinished character
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    hidden_state: torch.Tensor | None = None  # [hidden], on the CPU, in the base's type; None where not asked for


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A finished generation; `token_ids` hold the end token where the model ended by itself."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def _check(field: str, holds: bool, rule: str) -> None:
    if not holds:
        raise SettingError(field, rule)
