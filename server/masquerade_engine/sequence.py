"""Sequences and the batches made of them: plain data, no torch."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.prefix_index import BLOCK, Namespace
from masquerade_engine.requests import Request, SamplingParams

if TYPE_CHECKING:
    import torch

# Levels: who goes first. A request's priority, and warming behind both.
PLAYER, AMBIENT, WARMING = range(3)
NUM_PRIORITIES = 2
LEVELS = (PLAYER, AMBIENT, WARMING)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: its tokens, and how far their KV is computed."""

    request: Request
    detokenizer: Detokenizer
    tokens: list[int] = field(init=False)  # the prompt, then the output
    draws: random.Random = field(init=False)  # this request's own stream, one number a token
    slot: int = -1  # KV slot, while it runs
    num_computed: int = 0  # tokens whose KV is in the slot
    num_cached: int = 0  # tokens of the prompt read from the prefix cache when it was first admitted
    admitted_at: float | None = None  # seconds on the scheduler's clock, the first time
    turn: int = -1  # place in the order of first admissions
    deadline_at: float | None = None  # seconds on the scheduler's clock
    load_by: float = math.inf  # seconds on the scheduler's clock: until when it waits for weights of its own
    block_keys: list[int] = field(default_factory=list)  # see `InFlight`
    awaited: Awaited | None = None  # whose blocks it waits for
    lent: Loan | None = None  # a higher level's urgency, while somebody of that level waits for its blocks

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

    @property
    def level(self) -> int:
        return WARMING if self.request.prefill_only else self.request.priority

    @property
    def urgency(self) -> int:
        """Its level, or that of those who wait for what it computes now."""
        lent = self.lent
        return min(self.level, lent.level) if lent is not None and self.num_computed < lent.num_tokens else self.level

    def lend(self, level: int, num_tokens: int) -> None:
        """Somebody of this level waits for the first `num_tokens` tokens."""
        if self.lent is not None:
            level, num_tokens = min(level, self.lent.level), max(num_tokens, self.lent.num_tokens)
        self.lent = Loan(level, num_tokens)

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def num_wanted(self) -> int:
        """Tokens whose KV is wanted now: all of them, of a prefill-only request its whole blocks."""
        num_tokens = len(self.tokens)
        return num_tokens - num_tokens % BLOCK if self.request.prefill_only else num_tokens

    @property
    def num_reusable(self) -> int:
        """Tokens whose KV may come from elsewhere: one that is sampled after must be computed."""
        return self.num_wanted if self.request.prefill_only else len(self.tokens) - 1

    @property
    def is_decoding(self) -> bool:
        """Whether one token a step is left to compute: the last, which the next is sampled after."""
        return self.num_computed == len(self.tokens) - 1

    def chunk(self, num_tokens: int) -> Chunk:
        """The next tokens to compute."""
        samples = self.num_computed + num_tokens == len(self.tokens) and not self.request.prefill_only
        return Chunk(self, self.num_computed, num_tokens, samples)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Awaited:
    """The first `num_tokens` tokens of a running sequence, whose KV another one waits for."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_coming(self) -> bool:
        return self.sequence.is_running and self.sequence.num_computed < self.num_tokens


@dataclass(frozen=True, slots=True)
class Loan:
    """A level's urgency, until `num_tokens` tokens are computed."""

    level: int
    num_tokens: int


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
class Trim:
    """A slot's tokens from `start` up to `stop` are of nobody any more: their memory may go back to the system."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Stores come first, then trims, then loads, and then the chunks are computed."""

    chunks: tuple[Chunk, ...]
    stores: tuple[BlockCopy, ...] = ()
    loads: tuple[BlockCopy, ...] = ()
    trims: tuple[Trim, ...] = ()

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
    hidden_state: torch.Tensor | None = None  # what the head read, [hidden] on the CPU, where it was asked for
