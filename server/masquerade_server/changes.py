"""The change feed: one poller of the registry's events, so that any number of watchers costs one query."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masquerade_masks.registry.base import Registry
    from masquerade_masks.registry.records import Event

log = logging.getLogger("masquerade.changes")

POLL_S = 0.2  # a publish by the worker process is seen within this; a poll takes 0.1 ms of a thread
_BATCH = 500


class ChangeFeed:
    """Follows the registry from now on, tells `on_event` of each event, and wakes who waits for the next."""

    def __init__(self, registry: Registry, on_event: Callable[[Event], None]) -> None:
        self._registry = registry
        self._on_event = on_event
        self._news = asyncio.Event()

    async def follow(self) -> None:
        """Poll until cancelled. A registry that fails for a while is polled again."""
        seq = await asyncio.to_thread(self._registry.last_seq)
        while True:
            try:
                events = await asyncio.to_thread(self._registry.changes_after, seq, _BATCH)
            except Exception:
                log.exception("the registry cannot be polled; trying again")
                await asyncio.sleep(1.0)
                continue
            for event in events:
                seq = event.seq
                self._on_event(event)
            if events:
                self.wake()
            await asyncio.sleep(POLL_S)

    def wake(self) -> None:
        """Wake everyone who waits: something changed, or the server is closing."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def ticket(self) -> asyncio.Event:
        """Take one *before* reading the registry: it is set by whatever changes after that."""
        return self._news

    async def wait(self, ticket: asyncio.Event, timeout_s: float) -> bool:
        """Return True once something changed since the ticket was taken, False after `timeout_s`."""
        try:
            await asyncio.wait_for(ticket.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
