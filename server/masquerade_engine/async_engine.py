"""The engine for an event loop: steps run in one thread, tokens arrive as async iterators."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

import torch

from masquerade_engine.base import Base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction, Request, TokenOutput, Warmed, warm_request
from masquerade_engine.settings import EngineSettings, EngineStats
from masquerade_masks import EngineStopped, WeightsNotLoaded

logger = logging.getLogger(__name__)

# When to ask again for a persona whose own weights did not come: what drives them out is busy for longer than a moment.
_RETRY_LOADING_S = 5.0

_News = TokenOutput | BaseException


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """One consumer's end of a request. The loop alone touches `news`."""

    request: Request
    news: asyncio.Queue[_News] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class _Add:
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Cancel:
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncEngine:
    """An `Engine` in a thread of its own, from `async with` to its end.

    The model is loaded on entry, without blocking the loop; what `Engine` raises then passes through. That thread also
    loads it, and should be the only one of the process to compute with several: OpenMP gives every thread that does a
    pool of its own, and with more pool threads than cores, waiting at a barrier means to sleep. A step of one row took
    25 ms so, and 12 ms without a second pool (two cores, bundled model).
    """

    def __init__(
        self,
        base: Base,
        settings: EngineSettings | None = None,
        *,
        num_threads: int | None = None,  # that it computes with; None: torch's number
    ) -> None:
        self.base = base
        self._num_threads = num_threads
        self._settings = settings or EngineSettings()
        self._commands: queue.SimpleQueue[_Add | _Cancel | _Stop] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # the thread's own, by request id
        self._num_active = 0  # the loop's own: generations that are being consumed
        self._warm_numbers = count()
        self._stopped: EngineStopped | None = EngineStopped("it was not started")

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Engine] = self._loop.create_future()
        num_threads = self._num_threads or torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(loaded, num_threads), name="masquerade-engine")
        self._thread.daemon = True
        self._thread.start()
        try:
            self._engine = await loaded
        except BaseException:
            self._commands.put(_Stop())  # for one that has just been loaded for nobody
            raise
        self._stopped = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = self._stopped or EngineStopped()
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """The tokens of a request as they come; the last has a `finish_reason`.

        Closing the iterator cancels the request within a step. Raises `EngineStopped`, what `Engine.add` raises, and
        `WeightsNotLoaded` where the persona's own weights did not come in time.
        A step that fails ends its requests with the reason `error`.
        """
        stream = _Stream(request)
        self._num_active += not request.prefill_only
        finished = False
        try:
            self._commands.put(_Add(stream))
            if self._stopped is not None:  # after the put: the thread ends every command it finds once this is set
                raise EngineStopped(self._stopped.reason)
            while not finished:
                news = await stream.news.get()
                if isinstance(news, BaseException):
                    finished = True
                    raise news
                finished = news.finish_reason is not None
                if news.finish_reason == "unloaded":
                    raise WeightsNotLoaded(self._settings.load_timeout_s, _RETRY_LOADING_S)
                yield news
        finally:
            self._num_active -= not request.prefill_only
            if not finished:
                self._commands.put(_Cancel(stream))

    async def warm(self, function: PersonaFunction, prompt: tuple[int, ...], *, pin: bool = False) -> Warmed:
        """Install a function and compute a prompt into the prefix cache, behind every chat; returns once it is there.

        Cancelling it stops the work. See `Engine.warm`; raises `EngineStopped` where the computation fails as well.
        """
        request = warm_request(f"warm-{next(self._warm_numbers)}", function, prompt, pin=pin)
        *_, last = [output async for output in self.generate(request)]
        if last.finish_reason != "length":
            raise EngineStopped("a step failed while it warmed a prompt; the log says more")
        return Warmed(last.num_prompt_tokens, last.num_cached_tokens)

    def install(self, function: PersonaFunction) -> None:
        """See `Engine.install`. Returns at once."""
        self._engine.install(function)

    def forget(self, digest: str) -> None:
        """See `Engine.forget`."""
        self._engine.forget(digest)

    def residency(self, digest: str) -> str:
        """See `Engine.residency`."""
        return self._engine.residency(digest)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that a request may have."""
        return self._engine.max_model_len

    @property
    def busy(self) -> bool:
        """Whether any chat is active."""
        return self._num_active > 0

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._stopped is None

    # The rest runs in the engine's thread.

    def _run(self, loaded: asyncio.Future[Engine], num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        try:
            engine = Engine(self.base, self._settings)
        except BaseException as error:
            self._loop.call_soon_threadsafe(_settle, loaded, None, error)
            return
        with engine:
            self._loop.call_soon_threadsafe(_settle, loaded, engine, None)
            self._serve(engine)

    def _serve(self, engine: Engine) -> None:
        try:
            while self._obey(engine):
                self._deliver(self._step(engine))
        except BaseException as error:
            logger.exception("the engine's thread has failed")
            self._stopped = EngineStopped(f"its thread failed: {error!r}")
        finally:
            self._stopped = self._stopped or EngineStopped()
            self._tell_all(self._stopped)

    def _obey(self, engine: Engine) -> bool:
        """Take every command that has come, waiting for one where there is nothing to run; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except queue.Empty:
                return True
            match command:
                case _Add(stream):
                    self._add(engine, stream)
                case _Cancel(stream):
                    if self._streams.get(stream.request.id) is stream:
                        engine.cancel(stream.request.id)
                case _Stop():
                    return False

    def _add(self, engine: Engine, stream: _Stream) -> None:
        try:
            engine.add(stream.request)
        except Exception as error:
            self._tell([(stream, error)])
        else:
            self._streams[stream.request.id] = stream

    def _step(self, engine: Engine) -> list[TokenOutput]:
        try:
            return engine.step()
        except Exception:
            logger.exception("a step failed; its requests end with an error")
            return engine.abandon()

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        news: list[tuple[_Stream, _News]] = []
        for output in outputs:
            ended = output.finish_reason is not None
            stream = self._streams.pop(output.request_id) if ended else self._streams[output.request_id]
            news.append((stream, output))
        self._tell(news)

    def _tell_all(self, error: EngineStopped) -> None:
        """End every stream, those whose command was never read as well."""
        streams = list(self._streams.values())
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                streams.append(command.stream)
        self._streams.clear()
        self._tell([(stream, EngineStopped(error.reason)) for stream in streams])

    def _tell(self, news: list[tuple[_Stream, _News]]) -> None:
        if news:
            try:
                self._loop.call_soon_threadsafe(_put_all, news)
            except RuntimeError:  # the loop has closed: nobody listens
                logger.debug("the event loop is closed; %d outputs were dropped", len(news))


def _settle(loaded: asyncio.Future[Engine], engine: Engine | None, error: BaseException | None) -> None:
    if loaded.done():  # nobody waits any more
        return
    if error is not None:
        loaded.set_exception(error)
    elif engine is not None:
        loaded.set_result(engine)


def _put_all(news: list[tuple[_Stream, _News]]) -> None:
    for stream, item in news:
        stream.news.put_nowait(item)
