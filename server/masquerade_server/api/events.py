"""`GET /personas/{id}/events`: what happened to a persona, replayed and followed to the end of its sculpt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import JSONResponse, Response

from masquerade_masks import PersonaNotFound, SettingError
from masquerade_masks.registry import Event
from masquerade_server.sse import HEARTBEAT, EventStream, event
from masquerade_server.state import ServerState, StateDep
from masquerade_server.views import event_json

router = APIRouter(prefix="/personas", tags=["personas"])

_BATCH = 500
_HEARTBEAT_S = 15.0


@router.get("/{persona_id}/events")
async def persona_events(
    persona_id: str,
    state: StateDep,
    accept: Annotated[str | None, Header()] = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Events after `Last-Event-ID`, from the first without it.

    As server-sent events the stream follows a running sculpt and ends with it; as JSON (any other
    `Accept`) it is a list of what has happened so far. Leaving stops nothing.
    """
    seq = _sequence_number(last_event_id)
    await asyncio.to_thread(state.registry.get_persona, persona_id)
    if "text/event-stream" in (accept or ""):
        return EventStream(_follow(state, persona_id, seq))
    found = await asyncio.to_thread(_all_events, state, persona_id, seq)
    return JSONResponse({"data": [event_json(one) for one in found]})


async def _follow(state: ServerState, persona_id: str, seq: int) -> AsyncGenerator[bytes, None]:
    """Every event once, in order, until the persona's job has ended or the server closes."""
    heard = time.monotonic()
    while not state.closing.is_set():
        ticket = state.changes.ticket()
        sculpting = await asyncio.to_thread(_is_sculpting, state, persona_id)  # read before the events
        found = await asyncio.to_thread(state.registry.events_after, persona_id, seq, _BATCH)
        for one in found:
            seq = one.seq
            yield event(event_json(one), type=one.type, id=one.seq)
        if found:
            heard = time.monotonic()
            continue
        if not sculpting:
            return
        if time.monotonic() - heard > _HEARTBEAT_S:
            heard = time.monotonic()
            yield HEARTBEAT
        await state.changes.wait(ticket, _HEARTBEAT_S)


def _is_sculpting(state: ServerState, persona_id: str) -> bool:
    try:
        state.registry.get_persona(persona_id)
    except PersonaNotFound:
        return False
    job = state.registry.latest_job(persona_id)
    return job is not None and not job.is_final


def _all_events(state: ServerState, persona_id: str, seq: int) -> list[Event]:
    events: list[Event] = []
    while batch := state.registry.events_after(persona_id, seq, _BATCH):
        events += batch
        seq = batch[-1].seq
    return events


def _sequence_number(last_event_id: str | None) -> int:
    if last_event_id is None or last_event_id == "":
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 19):
        raise SettingError("Last-Event-ID", f"{last_event_id[:40]!r} is not an event's id, which is a number")
    return int(last_event_id)
