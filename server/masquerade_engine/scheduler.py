"""What runs in the next step, and what its tokens mean for each sequence: policy, no torch."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import FinishReason, TokenOutput
from masquerade_engine.sequence import Batch, BlockCopy, Chunk, SampledToken, Sequence
from masquerade_masks import ContextTooLong, QueueFull, SettingError

NUM_PRIORITIES = 2  # 0: a player waits; 1: ambient chatter


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The bounds a scheduler keeps."""

    max_num_seqs: int
    max_model_len: int  # tokens of prompt and output
    prefill_chunk: int  # prompt tokens a step
    max_queue: int


class Scheduler:
    """Continuous batching over KV slots, with chunked prefill and prefix reuse.

    `stop_token_ids` end a generation unless its request ignores them.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        prefixes: PrefixIndex,
        stop_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._prefixes = prefixes
        self._stop_token_ids = stop_token_ids
        self._clock = clock
        self._waiting: tuple[deque[Sequence], ...] = tuple(deque() for _ in range(NUM_PRIORITIES))
        self._running: dict[str, Sequence] = {}  # by request id, in order of admission
        self._free_slots = list(range(limits.max_num_seqs))  # a heap: low slots keep the decode's KV range short
        self._stores: list[BlockCopy] = []
        self._seconds_a_request = 1.0  # moving average, from admission to the last token
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether one more request would be taken."""
        return self.num_waiting < self._limits.max_queue + len(self._free_slots)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `ContextTooLong`, `QueueFull`, or `SettingError` for a bad request."""
        request = sequence.request
        if not request.prompt:
            raise SettingError("prompt", "must hold at least one token")
        if not 0 <= request.priority < NUM_PRIORITIES:
            raise SettingError("priority", f"must be between 0 and {NUM_PRIORITIES - 1}")
        if request.id in self._running or any(request.id == other.request.id for other in self._queued()):
            raise SettingError("id", f"a request {request.id!r} is already here")
        if sequence.num_prompt + 1 > self._limits.max_model_len:
            raise ContextTooLong(sequence.num_prompt + 1, self._limits.max_model_len)
        if not self.has_room:
            raise QueueFull(self._limits.max_queue, self._retry_after_s())
        self._waiting[request.priority].append(sequence)

    def cancel(self, request_id: str) -> TokenOutput | None:
        """Drop a request at once, wherever it is; None where there is no such request."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            self._release(sequence)
            return _last_words(sequence, "cancelled")
        for sequence in self._queued():
            if sequence.request.id == request_id:
                self._waiting[sequence.request.priority].remove(sequence)
                return _last_words(sequence, "cancelled")
        return None

    def next_batch(self) -> Batch:
        """Every decoding sequence's next token, and prompt chunks within the budget."""
        chunks = [
            sequence.chunk(1) for sequence in self._running.values() if sequence.num_computed >= sequence.num_prompt
        ]
        budget = self._limits.prefill_chunk
        for sequence in self._prefilling():
            budget -= _take(sequence, budget, chunks)
        loads: list[BlockCopy] = []
        while budget > 0 and self._free_slots and self.num_waiting:
            sequence = self._admit(loads)
            budget -= _take(sequence, budget, chunks)
        if not chunks:
            return Batch(())  # stores wait for a batch that runs: their slots stay untouched until then
        stores, self._stores = self._stores, []
        return Batch(tuple(chunks), tuple(stores), tuple(loads))

    def commit(self, batch: Batch, tokens: list[SampledToken]) -> list[TokenOutput]:
        """Take a step's tokens, one for each of `batch.sampling`, and end what has ended."""
        outputs = []
        sampled = iter(tokens)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.stop
            if chunk.start < sequence.num_prompt:
                self._keep_prefix(sequence)
            if chunk.samples:
                outputs.append(self._append(sequence, next(sampled)))
        return outputs

    def abandon(self) -> list[TokenOutput]:
        """End every running sequence with an error, and trust no KV that a failed step may have left."""
        self._stores.clear()
        self._prefixes.clear()
        failed = list(self._running.values())
        for sequence in failed:
            self._release(sequence)
        return [_last_words(sequence, "error") for sequence in failed]

    def _queued(self) -> list[Sequence]:
        return [sequence for queue in self._waiting for sequence in queue]

    def _prefilling(self) -> list[Sequence]:
        unfinished = [s for s in self._running.values() if s.num_computed < s.num_prompt]
        return sorted(unfinished, key=lambda sequence: sequence.request.priority)

    def _admit(self, loads: list[BlockCopy]) -> Sequence:
        sequence = next(queue for queue in self._waiting if queue).popleft()
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.admitted_at = self._clock()
        self._running[sequence.request.id] = sequence
        blocks = self._prefixes.match(sequence.namespace, sequence.request.prompt)
        if blocks:
            loads.append(BlockCopy(sequence.slot, 0, blocks))
            sequence.num_computed = sequence.num_cached = len(blocks) * BLOCK
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_cached
        return sequence

    def _append(self, sequence: Sequence, sampled: SampledToken) -> TokenOutput:
        sequence.tokens.append(sampled.token_id)
        self.num_output_tokens += 1
        text, reason = self._interpret(sequence, sampled.token_id)
        if reason is not None:
            self._keep_prefix(sequence)
            self._release(sequence)
        return TokenOutput(
            request_id=sequence.request.id,
            token_id=sampled.token_id,
            text=text,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=reason,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached,
            num_output_tokens=sequence.num_output,
        )

    def _interpret(self, sequence: Sequence, token_id: int) -> tuple[str, FinishReason | None]:
        """The text a token adds, and whether it ends the generation."""
        sampling, detokenizer = sequence.sampling, sequence.detokenizer
        may_stop = sequence.num_output >= sampling.min_tokens
        if token_id in self._stop_token_ids and not sampling.ignore_eos:
            return detokenizer.flush(), "stop"
        text, stopped = detokenizer.feed(token_id, may_stop=may_stop)
        if stopped:
            return text, "stop"
        if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._limits.max_model_len:
            return text + detokenizer.flush(), "length"
        return text, None

    def _keep_prefix(self, sequence: Sequence) -> None:
        new = self._prefixes.insert(sequence.namespace, sequence.tokens[: sequence.num_computed])
        if new.blocks:
            self._stores.append(BlockCopy(sequence.slot, new.start, new.blocks))

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence.request.id]
        heapq.heappush(self._free_slots, sequence.slot)
        seconds = self._clock() - sequence.admitted_at
        self._seconds_a_request += 0.1 * (seconds - self._seconds_a_request)

    def _retry_after_s(self) -> float:
        """When a place in the queue should be free: one request's time over the slots, in whole seconds."""
        return float(min(60, max(1, math.ceil(self._seconds_a_request / self._limits.max_num_seqs))))


def _take(sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
    num_tokens = min(budget, sequence.num_prompt - sequence.num_computed)
    if num_tokens > 0:
        chunks.append(sequence.chunk(num_tokens))
    return num_tokens


def _last_words(sequence: Sequence, reason: FinishReason) -> TokenOutput:
    return TokenOutput(
        request_id=sequence.request.id,
        token_id=None,
        text=sequence.detokenizer.flush(),
        logprob=None,
        top_logprobs=(),
        finish_reason=reason,
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached,
        num_output_tokens=sequence.num_output,
    )
