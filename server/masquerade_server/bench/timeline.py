"""One request as its client saw it: a reply with the moments of its chunks, or why there was none."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Timeline:
    """A streamed reply. Moments are `time.perf_counter` seconds.

    The server opens a stream with the first token (the role chunk) and closes it with the last (the finish chunk), so
    both are timed even where a token makes no text of its own.
    """

    sent: float
    first: float  # the opening chunk
    last: float  # the finish chunk
    texts: tuple[float, ...]  # every chunk with text
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.last - self.sent

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a reply of one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.last - self.first) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies: between neighbouring chunks of text, nearly all of one token."""
        return [after - before for before, after in pairwise(self.texts)]


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a whole reply."""

    kind: str  # what failures are counted by
    message: str  # of this one
