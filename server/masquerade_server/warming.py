"""Warming: a persona's prompt and weights made ready before anybody speaks to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masquerade_engine.prompt import shared_prefix
from masquerade_masks import MasqueradeError
from masquerade_server.errors import ModelNotFound

if TYPE_CHECKING:
    from masquerade_server.catalogue import Target
    from masquerade_server.state import Backend

log = logging.getLogger("masquerade.warming")

_AT_ONCE = 4  # prompts on their way: what one step computes of them (512 tokens) is about three of 170
_MAX_ORDERS = 256  # personas that wait; of more, those ordered first are left to their first chat


@dataclass(frozen=True, slots=True)
class WarmPersona:
    """A persona that is ready."""

    id: str  # as it was asked for
    version: int | None  # None: the unpruned base
    prompt_tokens: int  # that every chat with it begins with
    cached_tokens: int  # of these, ready before
    residency: str


def targets_of(backend: Backend, ids: Sequence[str]) -> list[Target]:
    """What each id is served by. Raises `ModelNotFound` for the first that is unknown; blocks: use a thread."""
    return [_target(backend, index, asked) for index, asked in enumerate(ids)]


async def warm_all(backend: Backend, targets: Sequence[Target], *, pin: bool = False) -> list[WarmPersona]:
    """Warm every target, a few at once; cancelling it stops the rest.

    Raises what the engine raises for any of them, and then stops the rest as well.
    """
    places = asyncio.Semaphore(_AT_ONCE)

    async def in_turn(target: Target) -> WarmPersona:
        async with places:
            return await warm(backend, target, pin=pin)

    tasks = [asyncio.create_task(in_turn(target)) for target in targets]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def warm(backend: Backend, target: Target, *, pin: bool = False) -> WarmPersona:
    """Compute what every chat with a target begins with, and have its weights prepared.

    Raises what `render_chat` and the engine raise.
    """
    prefix = await asyncio.to_thread(shared_prefix, backend.base.tokenizer, target.system_prompt)
    warmed = await backend.engine.warm(target.function, tuple(prefix), pin=pin)
    return WarmPersona(
        id=target.model,
        version=target.version,
        prompt_tokens=warmed.num_prompt_tokens,
        cached_tokens=warmed.num_cached_tokens,
        residency="dense" if target.version is None else backend.engine.residency(target.function.digest),
    )


class BackgroundWarmer:
    """Warms personas one after another, behind everything else; each is warmed as it is served when its turn comes."""

    def __init__(self) -> None:
        self._orders: dict[str, None] = {}  # persona ids, oldest first
        self._news = asyncio.Event()

    def order(self, persona_id: str) -> None:
        """Warm a persona soon. For the event loop's thread."""
        self._orders.pop(persona_id, None)
        self._orders[persona_id] = None
        if len(self._orders) > _MAX_ORDERS:
            del self._orders[next(iter(self._orders))]
        self._news.set()

    async def run(self, backend: Backend) -> None:
        """Carry orders out until cancelled. A persona that cannot be warmed is named in the log."""
        while True:
            await self._news.wait()
            while self._orders:
                persona_id = next(iter(self._orders))
                del self._orders[persona_id]
                await self._carry_out(backend, persona_id)
            self._news.clear()

    async def _carry_out(self, backend: Backend, persona_id: str) -> None:
        try:
            target = await asyncio.to_thread(backend.catalogue.target, persona_id)
            warmed = await warm(backend, target)
        except ModelNotFound:  # deleted meanwhile
            return
        except MasqueradeError as error:
            log.warning("persona %s could not be warmed: %s", persona_id, error)
        except Exception:
            log.exception("persona %s could not be warmed", persona_id)
        else:
            log.debug("persona %s is warm: %d tokens", persona_id, warmed.prompt_tokens)


def _target(backend: Backend, index: int, asked: str) -> Target:
    try:
        return backend.catalogue.target(asked)
    except ModelNotFound as error:
        raise ModelNotFound(asked, str(error), f"ids[{index}]") from error
