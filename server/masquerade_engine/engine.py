"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from masquerade_engine.base import Base
from masquerade_engine.detokenizer import Decode, Detokenizer
from masquerade_engine.kv_cache import KVGeometry
from masquerade_engine.prefix_index import BLOCK, PrefixIndex
from masquerade_engine.requests import GenerationResult, PersonaFunction, Request, TokenOutput
from masquerade_engine.runner import Runner
from masquerade_engine.scheduler import Scheduler, SchedulerLimits
from masquerade_engine.sequence import Sequence
from masquerade_engine.settings import EngineSettings, EngineStats
from masquerade_masks import BaseMismatch, MaskShapeError, SettingError, SubNetwork


class Engine:
    """One base, any mix of personas, one ragged batch a step. For one thread, except `install` and `residency`.

    Raises `SettingError` where the settings and the base do not go together.
    """

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        geometry = KVGeometry.of(base.config, base.dtype)
        self.base = base
        self.max_model_len = settings.resolve_max_model_len(base.context_length, geometry.bytes_per_token)
        num_blocks = settings.prefix_cache_bytes // (geometry.bytes_per_token * BLOCK)
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=settings.max_num_seqs,
                max_model_len=self.max_model_len,
                prefill_chunk=settings.prefill_chunk,
                max_queue=settings.max_queue,
            ),
            PrefixIndex(num_blocks),
            base.stop_token_ids,
        )
        self.runner = Runner(
            base,
            num_slots=settings.max_num_seqs,
            max_len=self.max_model_len,
            num_blocks=num_blocks,
            pack_cache_bytes=settings.pack_cache_bytes,
        )
        self._decode = _decoder(base)
        self._installed: set[str] = set()
        self._installing = threading.Lock()
        self._cancelled: list[TokenOutput] = []
        self._num_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises `QueueFull`, `ContextTooLong`, `BaseMismatch` or `MaskShapeError` for a mask of another base, and
        `SettingError` for an empty prompt, a token outside the vocabulary or an id in use.
        """
        last = self.base.config.vocab_size - 1
        if request.prompt and not (min(request.prompt) >= 0 and max(request.prompt) <= last):
            raise SettingError("prompt", f"holds a token id outside 0 to {last}")
        self._check(request.function)
        self.scheduler.add(Sequence(request, Detokenizer(self._decode, request.sampling.stop)))
        self.install(request.function)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, which reports it; one that is not here is no error."""
        output = self.scheduler.cancel(request_id)
        if output is not None:
            self._cancelled.append(output)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._cancelled) or self.scheduler.num_running + self.scheduler.num_waiting > 0

    def step(self) -> list[TokenOutput]:
        """Run one batch; the news of every request that got a token or ended.

        What a failing pass raises passes through; `abandon` then ends the requests it held.
        """
        outputs, self._cancelled = self._cancelled, []
        batch = self.scheduler.next_batch()
        if batch.chunks:
            tokens = self.runner.run(batch)
            outputs += self.scheduler.commit(batch, tokens)
            self._num_steps += 1
        return outputs

    def abandon(self) -> list[TokenOutput]:
        """After a failed step: end every running request with `error`. Those that wait go on waiting."""
        return self.scheduler.abandon()

    def generate_all(self, requests: Iterable[Request]) -> dict[str, GenerationResult]:
        """Run requests to their ends at the highest batch that fits; results by request id, in order of ending.

        Takes any number of requests, the queue's bound notwithstanding. What `add`, `step` or `requests` raise passes
        through, and leaves none of them behind.
        """
        collected: dict[str, list[TokenOutput]] = {}
        results: dict[str, GenerationResult] = {}
        pending = iter(requests)
        try:
            while self._refill(pending, collected) or self.has_work:
                for output in self.step():
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

        Raises `BaseMismatch` or `MaskShapeError` for a mask of another base.
        """
        self._check(function)
        with self._installing:
            self._installed.add(function.digest)
        if function.subnetwork is not None:
            self.runner.packs.want(function.subnetwork)

    def forget(self, digest: str) -> None:
        """A persona's function is no longer served, and gives its pack back; what runs still finishes on it."""
        with self._installing:
            self._installed.discard(digest)
        self.runner.packs.drop(digest)

    def residency(self, digest: str) -> str:
        """`compact`, `dense` (served through the base's own pack) or `none` (not installed)."""
        if digest in self.runner.packs.resident():
            return "compact"
        return "dense" if digest in self._installed else "none"

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
            num_compact_packs=len(self.runner.packs.resident()),
            compact_pack_bytes=self.runner.packs.num_bytes,
        )

    def close(self) -> None:
        """Stop the background work."""
        self.runner.packs.close()

    def _check(self, function: PersonaFunction) -> None:
        subnetwork: SubNetwork | None = function.subnetwork
        if subnetwork is None:
            return
        if subnetwork.base != self.base.fingerprint:
            raise BaseMismatch(self.base.fingerprint, subnetwork.base)
        if subnetwork.shape != self.base.shape:
            raise MaskShapeError(f"the mask is for {subnetwork.shape}, and the base has {self.base.shape}")


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
