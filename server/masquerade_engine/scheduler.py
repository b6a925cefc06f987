"""What runs in the next step, and what its tokens mean for each sequence: policy, no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from masquerade_engine.in_flight import InFlight
from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import FinishReason, TokenOutput
from masquerade_engine.sequence import (
    AMBIENT,
    LEVELS,
    NUM_PRIORITIES,
    PLAYER,
    Batch,
    BlockCopy,
    Chunk,
    SampledToken,
    Sequence,
)
from masquerade_engine.slots import Slots
from masquerade_engine.waiting import WaitingQueue
from masquerade_masks import ContextTooLong, QueueFull, SettingError, SubNetwork


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The bounds a scheduler keeps."""

    max_num_seqs: int
    max_model_len: int  # tokens of prompt and output, at most `kv_tokens`
    prefill_chunk: int  # prompt tokens a step
    max_queue: int  # requests of a priority beyond `max_num_seqs`
    kv_tokens: int  # that running sequences may hold together
    kept_slot_tokens: int  # whose memory a slot keeps when nobody runs in it
    load_timeout_s: float = 30.0  # that a sequence waits for its persona's own weights


class Scheduler:
    """Continuous batching over KV slots, with chunked prefill and prefix reuse.

    Players (priority 0) go strictly before ambient chatter (1), and that before warming: in admission, in each step's
    prompt tokens, and in keeping a slot. What players leave is ambient's, so a steady stream of players that fills
    every slot does hold ambient chatter up, until its deadline if it has one; what it had computed is in the prefix
    cache when its turn comes. Within a level casts take turns, and a cast's requests come first, first served.

    Admission is by KV budget: a sequence is let in with what it holds and what all would grow by until its first
    token. Where running sequences outgrow the budget, or a higher level waits without room, one is preempted: of the
    lowest level, the one admitted last. It loses its slot and none of its tokens, goes to the front of its queue, and
    later computes again what the prefix cache has not kept. The order of first admissions is never changed by it, so
    of each level the oldest sequence always gets on. One sequence always fits.

    A request whose prompt is just being computed by a running one waits for those blocks; others may go ahead of it, in
    slots and budget that it does not need. One of a persona with FFN weights of its own waits in its queue until they
    are loaded, which `loading` tells (by digest: loaded, loading or failed), and ends with `unloaded` where that takes
    too long; others go ahead of it.

    `stop_token_ids` end a generation unless its request ignores them.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        prefixes: PrefixIndex,
        stop_token_ids: frozenset[int],
        clock: Callable[[], float] = time.monotonic,
        loading: Callable[[str], str] = lambda digest: "loaded",
    ) -> None:
        self._limits = limits
        self._prefixes = prefixes
        self._stop_token_ids = stop_token_ids
        self._clock = clock
        self._loading = loading
        self._own: dict[str, list[Sequence]] = {}  # live sequences whose weights are their own, by digest
        self._live: dict[str, Sequence] = {}  # waiting and running, by request id
        self._num_live = [0 for _ in LEVELS]
        self._timed: dict[str, Sequence] = {}  # those with a deadline
        self._waiting = [WaitingQueue() for _ in LEVELS]
        self._running: dict[str, Sequence] = {}  # by request id
        self._in_flight = InFlight()
        self._slots = Slots(limits.max_num_seqs, limits.kept_slot_tokens)
        self._stores: list[BlockCopy] = []
        self._loads: list[BlockCopy] = []
        self._passed: set[Sequence] = set()  # over in this step, while others compute their blocks
        self._news: list[TokenOutput] = []  # of requests that ended between steps
        self._seconds_a_request = 1.0  # moving average, from admission to the last token
        self._num_turns = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_preempted = 0
        self.num_deadline = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting))

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do or to tell."""
        return bool(self._live or self._news)

    @property
    def needed(self) -> Mapping[str, SubNetwork]:
        """The personas with weights of their own that live sequences are of, by digest."""
        functions = ((digest, sequences[0].request.function) for digest, sequences in self._own.items())
        return {digest: one.subnetwork for digest, one in functions if one.subnetwork is not None}

    @property
    def has_room(self) -> bool:
        """Whether one more request would be taken, of either priority."""
        return max(self._num_live[PLAYER], self._num_live[AMBIENT]) < self._max_live

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `ContextTooLong`, `QueueFull`, or `SettingError` for a bad request."""
        self._check(sequence)
        request = sequence.request
        if request.pin:
            self._prefixes.pin(sequence.namespace, request.prompt)
        self._live[request.id] = sequence
        self._num_live[sequence.level] += 1
        self._waiting[sequence.level].append(sequence)
        if request.function.has_own_ffn:
            sequence.load_by = self._clock() + self._limits.load_timeout_s
            self._own.setdefault(request.function.digest, []).append(sequence)
        if request.deadline_s is not None:
            sequence.deadline_at = self._clock() + request.deadline_s
            self._timed[request.id] = sequence
        if self._is_warm(sequence):
            self._news.append(self._end(sequence, "length"))

    def cancel(self, request_id: str) -> TokenOutput | None:
        """Drop a request at once, wherever it is; None where there is no such request."""
        sequence = self._live.get(request_id)
        return None if sequence is None else self._end(sequence, "cancelled")

    def forget(self, digest: str) -> None:
        """Drop the prefix blocks of a function and unpin them; what runs still finishes."""
        self._prefixes.forget(digest)

    def next_batch(self) -> Batch:
        """Every decoding sequence's next token, and prompt chunks within the step's number of prompt tokens."""
        self._end_overdue()
        self._end_unloaded()
        self._fit_budget()
        prefill = self._prefill()
        taken = {chunk.sequence for chunk in prefill}
        decoding = [s.chunk(1) for s in self._running.values() if s.is_decoding and s not in taken]
        if not decoding and not prefill:
            return Batch(())  # stores wait for a batch that runs: their slots stay untouched until then
        batch = Batch((*decoding, *prefill), tuple(self._stores), tuple(self._loads), self._slots.trims())
        self._stores, self._loads = [], []
        return batch

    def commit(self, batch: Batch, tokens: list[SampledToken]) -> list[TokenOutput]:
        """Take a step's tokens, one for each of `batch.sampling`, and end what has ended."""
        outputs, self._news = self._news, []
        sampled = iter(tokens)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.stop
            if chunk.start < sequence.num_prompt or chunk.num_tokens > 1:
                self._keep_prefix(sequence)
                if chunk.stop // BLOCK == sequence.num_wanted // BLOCK:
                    self._in_flight.drop(sequence)
            if chunk.samples:
                outputs.append(self._append(sequence, next(sampled)))
            elif sequence.request.prefill_only and chunk.stop == sequence.num_wanted:
                outputs.append(self._end(sequence, "length"))
        return outputs

    def abandon(self) -> list[TokenOutput]:
        """End every running sequence with an error, and trust no KV that a failed step may have left."""
        self._stores.clear()
        self._loads.clear()
        self._prefixes.clear()
        return [self._end(sequence, "error") for sequence in list(self._running.values())]

    # Requests come and go.

    @property
    def _max_live(self) -> int:
        return self._limits.max_queue + self._limits.max_num_seqs

    def _check(self, sequence: Sequence) -> None:
        request = sequence.request
        if not request.prompt:
            raise SettingError("prompt", "must hold at least one token")
        if not 0 <= request.priority < NUM_PRIORITIES:
            raise SettingError("priority", f"must be between 0 and {NUM_PRIORITIES - 1}")
        if request.deadline_s is not None and not request.deadline_s > 0:
            raise SettingError("deadline_s", "must be above 0 seconds")
        if request.id in self._live:
            raise SettingError("id", f"a request {request.id!r} is already here")
        if sequence.num_prompt + 1 > self._limits.max_model_len:
            raise ContextTooLong(sequence.num_prompt + 1, self._limits.max_model_len)
        if self._num_live[sequence.level] >= self._max_live:
            raise QueueFull(self._limits.max_queue, self._retry_after_s())

    def _end(self, sequence: Sequence, reason: FinishReason) -> TokenOutput:
        """A request ends without a new token."""
        if not sequence.is_running:
            self._waiting[sequence.level].remove(sequence)
        self._retire(sequence)
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

    def _retire(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self._leave_slot(sequence)
        del self._live[sequence.request.id]
        self._num_live[sequence.level] -= 1
        self._timed.pop(sequence.request.id, None)
        if sequence.request.function.has_own_ffn:
            self._let_go(sequence)
        if sequence.admitted_at is not None and not sequence.request.prefill_only:
            seconds = self._clock() - sequence.admitted_at
            self._seconds_a_request += 0.1 * (seconds - self._seconds_a_request)

    def _let_go(self, sequence: Sequence) -> None:
        """Its persona's own weights are needed no more by it."""
        digest = sequence.request.function.digest
        self._own[digest].remove(sequence)
        if not self._own[digest]:
            del self._own[digest]

    def _end_unloaded(self) -> None:
        """End those whose own weights do not come."""
        for digest, sequences in list(self._own.items()):
            loading = self._loading(digest)
            if loading != "loaded":
                now = self._clock()
                late = [one for one in sequences if loading == "failed" or now >= one.load_by]
                self._news += [self._end(sequence, "unloaded") for sequence in late]

    def _end_overdue(self) -> None:
        if self._timed:
            now = self._clock()
            overdue = [sequence for sequence in self._timed.values() if _is_overdue(sequence, now)]
            self._news += [self._miss(sequence) for sequence in overdue]

    def _miss(self, sequence: Sequence) -> TokenOutput:
        """The deadline has passed: it cuts an answer short, and is an answer of its own where there is none."""
        self.num_deadline += 1
        if sequence.is_running:
            self._keep_prefix(sequence)
        return self._end(sequence, "length" if sequence.num_output else "deadline")

    def _retry_after_s(self) -> float:
        """When a place in the queue should be free: one request's time over the slots, in whole seconds."""
        return float(min(60, max(1, math.ceil(self._seconds_a_request / self._limits.max_num_seqs))))

    # Who runs.

    def _prefill(self) -> list[Chunk]:
        """Prompt chunks of those that run and of those that are let in now, higher levels first."""
        chunks: list[Chunk] = []
        budget, admitting = self._limits.prefill_chunk, True
        self._passed.clear()
        for level in LEVELS:
            for sequence in self._prefilling(level, {chunk.sequence for chunk in chunks}):
                budget -= _take(sequence, budget, chunks)
            while admitting and budget > 0 and (newcomer := self._waiting[level].first(self._may_go)) is not None:
                if self._is_warm(newcomer):
                    self._news.append(self._end(newcomer, "length"))
                elif admitting := self._make_room(newcomer):  # nobody overtakes for being smaller or of a lower level
                    self._admit(newcomer)
                    budget -= _take(newcomer, budget, chunks)
        return chunks

    def _prefilling(self, level: int, taken: Collection[Sequence]) -> list[Sequence]:
        """Those in mid-prompt that are due at a level, or were lent urgency after theirs was."""
        running = [s for s in self._running.values() if s.urgency <= level and s not in taken]
        return sorted((s for s in running if not s.is_decoding), key=lambda sequence: sequence.turn)

    def _may_go(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence waits for no other's blocks; who computes those is then as urgent as it is."""
        if sequence in self._passed or not self._is_loaded(sequence):
            return False
        awaited = self._in_flight.awaited_by(sequence)
        if awaited is None:
            return True
        awaited.sequence.lend(sequence.level, awaited.num_tokens)
        self._passed.add(sequence)
        return False

    def _is_loaded(self, sequence: Sequence) -> bool:
        function = sequence.request.function
        return not function.has_own_ffn or self._loading(function.digest) == "loaded"

    def _is_warm(self, sequence: Sequence) -> bool:
        """Whether a prefill-only request has nothing left to compute."""
        if not sequence.request.prefill_only:
            return False
        wanted = min(sequence.num_wanted, self._prefixes.num_blocks * BLOCK)
        sequence.num_cached = len(self._prefixes.match(sequence.namespace, sequence.tokens, wanted)) * BLOCK
        return sequence.num_cached == wanted

    def _make_room(self, sequence: Sequence) -> bool:
        """Have a slot and budget for a sequence, if need be those of lower levels; False where they do not suffice.

        Slots and budget of those that were passed over are not touched.
        """
        victims = [other for other in self._running.values() if other.urgency > sequence.level]
        stay = len(self._running) - len(victims)
        held = _num_held(self._running.values()) - _num_held(victims) + _num_held(self._passed)
        if self._slots.num_free + len(victims) <= len(self._passed) or not self._fits(sequence, stay, held):
            return False
        victims.sort(key=_preemption_order)
        while not self._has_room(sequence):
            self._preempt(victims.pop())
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        held = _num_held(self._running.values())
        return self._slots.num_free > 0 and self._fits(sequence, len(self._running), held)

    def _fits(self, sequence: Sequence, num_others: int, num_held: int) -> bool:
        """Whether the budget lasts until a sequence's first token, beside others that hold so many tokens."""
        num_steps = 1 + len(sequence.tokens) // self._limits.prefill_chunk
        grown = num_held + len(sequence.tokens) + num_steps * (num_others + 1)
        return num_others == 0 or grown <= self._limits.kv_tokens

    def _fit_budget(self) -> None:
        """Preempt while running sequences hold more than the budget."""
        while _num_held(self._running.values()) > self._limits.kv_tokens:
            self._preempt(max(self._running.values(), key=_preemption_order))

    def _admit(self, sequence: Sequence) -> None:
        self._waiting[sequence.level].take(sequence)
        self._running[sequence.request.id] = sequence
        sequence.slot = self._slots.take()
        blocks = self._prefixes.match(sequence.namespace, sequence.tokens, sequence.num_reusable)
        if blocks:
            self._loads.append(BlockCopy(sequence.slot, 0, blocks))
        sequence.num_computed = len(blocks) * BLOCK
        self._in_flight.claim(sequence, self._prefixes.num_reusable)
        if sequence.admitted_at is None:
            self._count_in(sequence)

    def _count_in(self, sequence: Sequence) -> None:
        """What is told of a sequence's first admission only."""
        sequence.admitted_at = self._clock()
        sequence.num_cached = sequence.num_computed
        sequence.turn = self._num_turns
        self._num_turns += 1
        if not sequence.request.prefill_only:
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_tokens += sequence.num_cached

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's slot. Nothing of it is lost but KV, and of that the prefix cache keeps what it can."""
        self._keep_prefix(sequence)
        self._leave_slot(sequence)
        sequence.num_computed = 0
        sequence.lent = None
        self._waiting[sequence.level].put_back(sequence)
        self.num_preempted += 1

    def _leave_slot(self, sequence: Sequence) -> None:
        del self._running[sequence.request.id]
        self._in_flight.drop(sequence)
        self._slots.leave(sequence.slot, sequence.num_computed)
        sequence.slot = -1

    # What tokens mean.

    def _append(self, sequence: Sequence, sampled: SampledToken) -> TokenOutput:
        if not sequence.num_output and _is_overdue(sequence, self._clock()):
            return self._miss(sequence)
        sequence.tokens.append(sampled.token_id)
        self.num_output_tokens += 1
        text, reason = self._interpret(sequence, sampled.token_id)
        if reason is not None:
            self._keep_prefix(sequence)
            self._retire(sequence)
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
            hidden_state=sampled.hidden_state,
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
        loading = {block for load in self._loads for block in load.blocks}
        new = self._prefixes.insert(sequence.namespace, sequence.tokens[: sequence.num_computed], loading)
        if new.blocks:
            self._stores.append(BlockCopy(sequence.slot, new.start, new.blocks))


def _take(sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
    num_tokens = min(budget, sequence.num_wanted - sequence.num_computed)
    if num_tokens > 0:
        chunks.append(sequence.chunk(num_tokens))
    return num_tokens


def _num_held(sequences: Iterable[Sequence]) -> int:
    """Tokens whose KV these sequences have after the step that computes their last."""
    return sum(len(sequence.tokens) for sequence in sequences)


def _preemption_order(sequence: Sequence) -> tuple[int, int]:
    """The last in this order goes first: of the lowest level, the one admitted last."""
    return sequence.urgency, sequence.turn


def _is_overdue(sequence: Sequence, now: float) -> bool:
    return sequence.deadline_at is not None and now >= sequence.deadline_at
