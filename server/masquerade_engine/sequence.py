"""Sequences and the batches made of them: plain data, no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.prefix_index import Namespace
from masquerade_engine.requests import Request, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens, and how far their KV is computed."""

    request: Request
    detokenizer: Detokenizer
    tokens: list[int] = field(init=False)  # the prompt, then the output
    draws: random.Random = field(init=False)  # this request's own stream, one number a token
    slot: int = -1  # KV slot, once admitted
    num_computed: int = 0  # tokens whose KV is in the slot
    num_cached: int = 0  # of these, read from the prefix cache
    admitted_at: float = 0.0  # seconds on the scheduler's clock

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.draws = random.Random(self.request.sampling.seed)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def namespace(self) -> Namespace:
        """What its KV depends on beside the tokens."""
        return self.request.function.digest, self.request.function.cast

    def chunk(self, num_tokens: int) -> Chunk:
        """The next tokens to compute."""
        samples = self.num_computed + num_tokens == len(self.tokens)
        return Chunk(self, self.num_computed, num_tokens, samples)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute in a step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # whether it ends at the sequence's last token, so that the next one is sampled

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """KV of a slot's tokens from `start` on, out to or in from blocks of the prefix cache."""

    slot: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Stores come before loads, loads before the chunks are computed."""

    chunks: tuple[Chunk, ...]
    stores: tuple[BlockCopy, ...] = ()
    loads: tuple[BlockCopy, ...] = ()

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of their chunks."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token picked for a sequence."""

    token_id: int
    logprob: float | None = None  # of the raw distribution
    top_logprobs: tuple[tuple[int, float], ...] = ()
