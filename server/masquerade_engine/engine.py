"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from types import TracebackType
from typing import Self

from masquerade_engine.base import Base
from masquerade_engine.detokenizer import Decode, Detokenizer
from masquerade_engine.kv_cache import KVGeometry, slots_are_lazy
from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import GenerationResult, PersonaFunction, Request, TokenOutput, warm_request
from masquerade_engine.runner import Runner
from masquerade_engine.scheduler import Scheduler, SchedulerLimits
from masquerade_engine.sequence import Sequence
from masquerade_engine.settings import EngineSettings, EngineStats
from masquerade_kernels.linear import can_run_int8
from masquerade_masks import AttachedNotFound, BaseMismatch, MaskShapeError, SettingError, SubNetwork

# Tokens whose memory a slot keeps when its sequence has gone. To write 200 tokens of SmolLM2 in bf16 took 2.5 ms where
# memory had been given back and 0.6 where it had not; giving back 200 took 0.9 ms, 7,700 took 24.
_KEPT_SLOT_TOKENS = 512
# How long a step waits where all there is to run waits for its own weights: as long as a command may have to wait.
_LOAD_POLL_S = 0.01


class Engine:
    """One base, any mix of personas, one ragged batch a step.

    For one thread, except `install`, `forget`, `residency` and `stats`.

    Raises `SettingError` where the settings and the base do not go together.
    """

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        geometry = KVGeometry.of(base.config, base.dtype)
        self.base = base
        self.max_model_len = settings.resolve_max_model_len(
            base.context_length, geometry.bytes_per_token, lazy_slots=slots_are_lazy(base.device)
        )
        kv_tokens = settings.kv_cache_bytes // geometry.bytes_per_token
        num_blocks = settings.prefix_cache_bytes // (geometry.bytes_per_token * BLOCK)
        self._prefixes = PrefixIndex(num_blocks)
        if settings.quantization == "int8" and not can_run_int8(base.device.type):
            raise SettingError("quantization", "int8 needs a CPU and a torch with oneDNN; use none")
        self.runner = Runner(
            base,
            num_slots=settings.max_num_seqs,
            max_len=self.max_model_len,
            num_blocks=num_blocks,
            pack_cache_bytes=settings.pack_cache_bytes,
            int8=settings.quantization == "int8",
            enforce_eager=settings.enforce_eager,
        )
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=settings.max_num_seqs,
                max_model_len=self.max_model_len,
                prefill_chunk=settings.prefill_chunk,
                max_queue=settings.max_queue,
                kv_tokens=kv_tokens,
                # Free slots together keep at most a quarter of the budget.
                kept_slot_tokens=min(_KEPT_SLOT_TOKENS, kv_tokens // (4 * settings.max_num_seqs)),
                load_timeout_s=settings.load_timeout_s,
            ),
            self._prefixes,
            base.stop_token_ids,
            loading=self.runner.packs.loading,
        )
        self._decode = _decoder(base)
        self._installed: dict[str, str] = {}  # digests, and what serves each where no pack of it is resident
        self._needs_packs = False
        self._installing = threading.Lock()
        self._cancelled: list[TokenOutput] = []
        self._forgotten: deque[str] = deque()  # digests whose prefix blocks are to go before the next step
        self._warm_numbers = count()
        self._num_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises `QueueFull`, `ContextTooLong`, `BaseMismatch` or `MaskShapeError` for a mask of another base,
        `AttachedNotFound` for one whose attached weights are not loaded, `WeightsTooLarge` for FFN weights that memory
        cannot hold, and `SettingError` for an empty prompt, a token outside the vocabulary, an id in use or a pin
        without room.
        """
        last = self.base.config.vocab_size - 1
        if request.prompt and not (min(request.prompt) >= 0 and max(request.prompt) <= last):
            raise SettingError("prompt", f"holds a token id outside 0 to {last}")
        self._check(request.function)
        if request.function.has_own_ffn:
            assert request.function.subnetwork is not None
            self.runner.packs.check_room(request.function.subnetwork)
        self._drop_forgotten()
        self.scheduler.add(Sequence(request, Detokenizer(self._decode, request.sampling.stop)))
        self.install(request.function)

    def warm(self, function: PersonaFunction, prompt: tuple[int, ...], *, pin: bool = False) -> str:
        """Install a function, and bring a prompt's whole blocks into the prefix cache behind everybody else.

        Returns the id of the request that does; it ends without a token. `pin` keeps the blocks from eviction until
        `forget`. Raises what `add` raises.
        """
        request = warm_request(f"warm-{next(self._warm_numbers)}", function, prompt, pin=pin)
        self.add(request)
        return request.id

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, which reports it; one that is not here is no error."""
        output = self.scheduler.cancel(request_id)
        if output is not None:
            self._cancelled.append(output)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._cancelled) or self.scheduler.has_work

    def step(self) -> list[TokenOutput]:
        """Run one batch; the news of every request that got a token or ended.

        What a failing pass raises passes through; `abandon` then ends the requests it held.
        """
        self._drop_forgotten()
        self._need_packs()
        batch = self.scheduler.next_batch()
        tokens = self.runner.run(batch) if batch.chunks else []
        outputs = self._cancelled + self.scheduler.commit(batch, tokens)
        self._cancelled = []
        self._num_steps += bool(batch.chunks)
        self._need_packs()
        if not batch.chunks and not outputs and self._needs_packs:
            self.runner.packs.wait(_LOAD_POLL_S)
        return outputs

    def abandon(self) -> list[TokenOutput]:
        """After a failed step: end every running request with `error`. Those that wait go on waiting."""
        return self.scheduler.abandon()

    def generate_all(self, requests: Iterable[Request]) -> dict[str, GenerationResult]:
        """Run requests to their ends at the highest batch that fits; results by request id, in order of ending.

        Takes any number of requests, the queue's bound notwithstanding. What `add`, `step` or `requests` raise passes
        through, and leaves none of them behind. The news of other requests that run beside these are lost.
        """
        collected: dict[str, list[TokenOutput]] = {}
        results: dict[str, GenerationResult] = {}
        pending = iter(requests)
        try:
            while self._refill(pending, collected) or self.has_work:
                for output in self.step():
                    if output.request_id not in collected:
                        continue
                    collected[output.request_id].append(output)
                    if output.finish_reason is not None:
                        results[output.request_id] = _result(collected.pop(output.request_id))
        except BaseException:
            self.abandon()
            for request_id in collected:
                self.scheduler.cancel(request_id)
            raise
        return results

    def _refill(self, pending: Iterator[Request], collected: dict[str, list[TokenOutput]]) -> bool:
        """Add requests while there is room; False once there are no more."""
        while self.scheduler.has_room:
            request = next(pending, None)
            if request is None:
                return False
            self.add(request)
            collected[request.id] = []
        return True

    def install(self, function: PersonaFunction) -> None:
        """Make a persona ready: it is served at once, and its compact pack is made in the background.

        One with FFN weights of its own is served once that pack is made. Raises `BaseMismatch` or `MaskShapeError` for
        a mask of another base, and `AttachedNotFound` for one whose attached weights are not loaded.
        """
        self._check(function)
        with self._installing:
            self._installed[function.digest] = "none" if function.has_own_ffn else "dense"
        if function.subnetwork is not None:
            self.runner.packs.want(function.subnetwork, function.cast)

    def forget(self, digest: str) -> None:
        """A persona's function is no longer served: its pack and its prefix blocks go, pinned ones as well.

        What runs still finishes on it.
        """
        with self._installing:
            self._installed.pop(digest, None)
        self.runner.packs.drop(digest)
        self._forgotten.append(digest)

    def residency(self, digest: str) -> str:
        """Which pack serves it: `compact`, `cast` or `dense` (the base's own).

        `none` where it is not installed, or its own FFN weights are not loaded.
        """
        return self.runner.packs.residency(digest) or self._installed.get(digest, "none")

    def stats(self) -> EngineStats:
        """Figures now and since the start; from another thread they may be of two neighbouring steps."""
        scheduler = self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=self._num_steps,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=scheduler.num_output_tokens,
            num_preempted=scheduler.num_preempted,
            num_deadline=scheduler.num_deadline,
            num_prefix_blocks=len(self._prefixes),
            num_pinned_prefix_blocks=self._prefixes.num_pinned,
            max_prefix_blocks=self._prefixes.num_blocks,
            num_packs=len(self.runner.packs.resident.packs),
            pack_bytes=self.runner.packs.num_bytes,
        )

    def close(self) -> None:
        """Stop the background work."""
        self.runner.packs.close()

    def _need_packs(self) -> None:
        needed = self.scheduler.needed
        if needed or self._needs_packs:
            self.runner.packs.need(needed)
        self._needs_packs = bool(needed)

    def _drop_forgotten(self) -> None:
        while self._forgotten:
            self.scheduler.forget(self._forgotten.popleft())

    def _check(self, function: PersonaFunction) -> None:
        subnetwork: SubNetwork | None = function.subnetwork
        if subnetwork is None:
            return
        if subnetwork.base != self.base.fingerprint:
            raise BaseMismatch(self.base.fingerprint, subnetwork.base)
        if subnetwork.shape != self.base.shape:
            raise MaskShapeError(f"the mask is for {subnetwork.shape}, and the base has {self.base.shape}")
        if subnetwork.attached and subnetwork.weights is None:
            raise AttachedNotFound(*subnetwork.attached[0])


def _result(outputs: list[TokenOutput]) -> GenerationResult:
    reason = outputs[-1].finish_reason
    assert reason is not None
    token_ids = tuple(output.token_id for output in outputs if output.token_id is not None)
    return GenerationResult(token_ids, "".join(output.text for output in outputs), reason)


def _decoder(base: Base) -> Decode:
    fast = getattr(base.tokenizer, "backend_tokenizer", None)
    if fast is not None:  # transformers' own decode costs ten times as much a token
        return lambda token_ids: str(fast.decode(token_ids, skip_special_tokens=True))
    return lambda token_ids: str(
        base.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
