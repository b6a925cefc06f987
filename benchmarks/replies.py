"""Streamed replies with the moment of every chunk, as a client sees them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from masquerade_client import Masquerade, Usage

QUESTIONS = (
    "What did you do this morning?",
    "Tell me about somebody you miss.",
    "What would you never sell, whatever the price?",
    "How does one get through a long winter?",
    "Who taught you the most?",
    "What do you make of strangers?",
    "Describe the room you are in.",
    "What are you afraid of?",
)


@dataclass(frozen=True, slots=True)
class TimedReply:
    """One reply. Moments are `time.perf_counter` seconds.

    The server opens a stream with the first token and closes it with the last, so both are timed even where a token
    makes no text of its own.
    """

    sent: float
    arrivals: tuple[float, ...]  # of every chunk, the opening and the finish chunk included
    fingerprints: frozenset[str | None]  # named by any chunk
    finish_reason: str | None
    num_tokens: int
    num_cached_tokens: int  # of the prompt

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.arrivals[0]

    @property
    def last(self) -> float:
        """When the last token came."""
        return self.arrivals[-1]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Seconds between neighbouring chunks, of which the later came between two moments."""
        pairs = itertools.pairwise(self.arrivals)
        return [after - before for before, after in pairs if since < after <= until]


def question(number: int) -> str:
    """Another one each time, so that only the persona's own prompt comes from the prefix cache."""
    return f"{QUESTIONS[number % len(QUESTIONS)]} (You were asked {number} things before.)"


def timed_reply(
    client: Masquerade,
    persona: str,
    text: str,
    *,
    num_tokens: int,
    on_chunk: Callable[[int], None] = lambda number: None,
) -> TimedReply:
    """Stream a reply of exactly `num_tokens`; `on_chunk` is told how many chunks have come."""
    sent = time.perf_counter()
    arrivals: list[float] = []
    fingerprints: set[str | None] = set()
    reply = client.chat.stream(persona, text, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True)
    for chunk in reply:
        if chunk.usage is None:  # the usage chunk comes after the last token
            arrivals.append(time.perf_counter())
            on_chunk(len(arrivals))
        fingerprints.add(chunk.system_fingerprint)
    whole = reply.result()
    usage = whole.usage or Usage()
    return TimedReply(
        sent,
        tuple(arrivals),
        frozenset(fingerprints),
        whole.finish_reason,
        usage.completion_tokens,
        usage.cached_tokens,
    )
