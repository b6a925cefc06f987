"""The `/personas` calls, as operations."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from .decode import decode, listed
from .errors import APIConnectionError, InvalidResponse, SculptCancelled, SculptFailed, ServerError
from .flow import Call, Emit, Flow, Pause, RetryPolicy, open_stream, quietly, read_events, send
from .options import SculptOptions, checked
from .records import Estimate, Event, Example, Job, Persona, Report, WarmPersona
from .sse import EventParser, ServerSentEvent
from .wire import Request, segment

_RECONNECT = RetryPolicy(max_retries=8)  # about 40 s without one event before a watcher gives up
_SILENCE_S = 60.0  # the server's heartbeat comes every 15 s; four missed ones are a dead connection
_ENDINGS = frozenset({"succeeded", "failed", "cancelled"})  # event types


def create(
    *,
    name: str,
    text: str,
    id: str | None = None,
    cast: str | None = None,
    sculpt: bool = True,
    idempotency_key: str | None = None,
    wait: bool = False,
    **options: Unpack[SculptOptions],
) -> Call[Persona]:
    """Create a persona and queue its sculpt; it answers chats at once, from the unpruned base.

    With `wait`, return only when its mask is published. With `sculpt=False` nothing is queued: a mask is
    uploaded instead, or learned after an `update`. `id` is made from the name where it is left out. The
    request carries an idempotency key, so a retry after a lost answer creates nothing twice.
    Raises BadRequest, Conflict (the id is taken), RateLimited; with `wait` also SculptFailed and
    SculptCancelled.
    """
    chosen = {"id": id, "cast": cast, "sculpt": sculpt, **checked(SculptOptions, options)}
    persona = yield from _submit(name, text, idempotency_key, chosen)
    return (yield from quietly(_follow(persona))) if wait else persona


def sculpt(
    *,
    name: str,
    text: str,
    id: str | None = None,
    cast: str | None = None,
    idempotency_key: str | None = None,
    **options: Unpack[SculptOptions],
) -> Flow[Event, Persona]:
    """Create a persona and follow its sculpt: iterate for the events, `result()` is the finished persona.

    Survives dropped connections. Leaving the loop early leaves the job running.
    Raises what `create(wait=True)` raises.
    """
    chosen = {"id": id, "cast": cast, **checked(SculptOptions, options)}
    persona = yield from _submit(name, text, idempotency_key, chosen)
    return (yield from _follow(persona))


def estimate(*, name: str, text: str, **options: Unpack[SculptOptions]) -> Call[Estimate]:
    """What sculpting this would take; nothing is created."""
    body = {"name": name, "text": text, "dry_run": True, **checked(SculptOptions, options)}
    payload = (yield from send(Request("POST", "/personas", body=body))).json()
    return decode(Estimate, _with_all(payload))


def _submit(name: str, text: str, key: str | None, chosen: Mapping[str, Any]) -> Call[Persona]:
    body = _given({"name": name, "text": text, **chosen})
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    response = yield from send(Request("POST", "/personas", body=body, headers=headers))
    return _persona(response.json())


def get(persona_id: str) -> Call[Persona]:
    """One persona, with its versions, job and residency. Raises NotFound."""
    return _persona((yield from send(Request("GET", _path(persona_id)))).json())


def list_all(*, cast: str | None = None, page_size: int = 50) -> Flow[Persona, None]:
    """Every persona, by id, fetched `page_size` at a time as the iteration goes on."""
    params = {"limit": str(page_size)}
    if cast is not None:
        params["cast"] = cast
    while True:
        page = (yield from send(Request("GET", "/personas", params=params))).json()
        for one in listed(page):
            yield Emit(decode(Persona, one))
        if not (cursor := page.get("next")):
            return
        params["after"] = str(cursor)


def update(
    persona_id: str,
    *,
    name: str | None = None,
    text: str | None = None,
    sculpt: bool | None = None,
    wait: bool = False,
    **options: Unpack[SculptOptions],
) -> Call[Persona]:
    """Change a persona; what is left out stays.

    Where anything changed, or with `sculpt=True`, a new version is sculpted while the old one serves;
    `sculpt=False` keeps the mask. With `wait`, return only when the new version is published.
    Raises NotFound, Conflict (a job is running); with `wait` also SculptFailed, SculptCancelled.
    """
    body = {"name": name, "text": text, "sculpt": sculpt, **checked(SculptOptions, options)}
    request = Request("PATCH", _path(persona_id), body=_given(body), repeatable=False)
    persona = _persona((yield from send(request)).json())
    return (yield from quietly(_follow(persona))) if wait and _is_sculpting(persona) else persona


def rollback(persona_id: str, version: int | None = None) -> Call[Persona]:
    """Serve an earlier version again, by default the one before. Raises NotFound."""
    body = _given({"version": version})
    request = Request("POST", _path(persona_id, "/rollback"), body=body, repeatable=version is not None)
    return _persona((yield from send(request)).json())


def delete(persona_id: str) -> Call[None]:
    """Remove a persona and stop its job; replies already being written are finished. Raises NotFound."""
    yield from send(Request("DELETE", _path(persona_id)))


def cancel(persona_id: str) -> Call[Job]:
    """Stop the running or queued sculpt. Raises NotFound, Conflict (nothing to stop)."""
    payload = (yield from send(Request("POST", _path(persona_id, "/cancel")))).json()
    return decode(Job, payload.get("job") if isinstance(payload, dict) else payload)


def warm(ids: Sequence[str], *, pin: bool = False) -> Call[list[WarmPersona]]:
    """Make the prompts and weights of up to 256 personas ready, before a player reaches them; returns once they are.

    An id may be `id@3` or `id@dense`. With `pin`, a prompt stays ready until another version is served in its place.
    Leaving early stops what is left. Raises NotFound (nothing was warmed), BadRequest (no more can be pinned).
    """
    if isinstance(ids, str):  # a string is a sequence too
        raise TypeError(f"ids is a list of persona ids, not {ids!r}")
    payload = (yield from send(Request("POST", "/personas/warm", body={"ids": list(ids), "pin": pin}))).json()
    return [decode(WarmPersona, one) for one in listed(payload)]


def events(persona_id: str, *, after: int | None = None) -> Call[list[Event]]:
    """The events so far, or those after one. Raises NotFound."""
    headers = {"Accept": "application/json"} | ({} if after is None else {"Last-Event-ID": str(after)})
    payload = (yield from send(Request("GET", _path(persona_id, "/events"), headers=headers))).json()
    return [decode(Event, _with_all(one)) for one in listed(payload)]


def watch(persona_id: str, *, after: int | None = None) -> Flow[Event, Persona]:
    """Follow a persona's running job to its end: iterate for the events, `result()` is the persona.

    A dropped connection is resumed after the last event seen, so none is lost or repeated; `after` resumes an
    earlier watch, and 0 tells the last job from its beginning, though it may have ended. Without it, ends at once where
    no job is running. Raises NotFound, SculptFailed, SculptCancelled.
    """
    persona = yield from get(persona_id)
    is_told = _is_sculpting(persona) or after is not None
    return (yield from _follow(persona, after)) if is_told else persona


def _is_sculpting(persona: Persona) -> bool:
    return persona.job is not None and not persona.job.ended


def _follow(persona: Persona, after: int | None = None) -> Flow[Event, Persona]:
    """Emit the events of the persona's job to the one that ends it, over as many connections as it takes."""
    job, ending, silent_rounds = persona.job, None, 0
    last_event_id = None if after is None else str(after)
    while job is not None:
        parser = EventParser(last_event_id)
        try:
            ending = ending or (yield from _events_of(persona.id, job, parser))
            persona = yield from get(persona.id)
            if ending is not None or _over(job, persona):
                return _finished(persona, ending)
        except (APIConnectionError, ServerError):
            if silent_rounds >= _RECONNECT.max_retries:
                raise
        silent_rounds = 0 if parser.last_event_id != last_event_id else silent_rounds + 1
        last_event_id = parser.last_event_id
        yield Pause(_RECONNECT.delay_s(silent_rounds))
    return persona


def _events_of(persona_id: str, job: Job, parser: EventParser) -> Flow[Event, Event | None]:
    """Emit one connection's events of `job`. The event that ended the job; None if the stream ended first."""
    headers = {"Accept": "text/event-stream"}
    if parser.last_event_id is not None:
        headers["Last-Event-ID"] = parser.last_event_id
    path = _path(persona_id, "/events")
    yield from open_stream(Request("GET", path, headers=headers, silence_s=_SILENCE_S))
    while (batch := (yield from read_events(parser))) is not None:
        for sse in batch:
            event = _event(sse)
            if event.job_id != job.id:
                continue
            yield Emit(event)
            if event.type in _ENDINGS:
                return event
    return None


def _event(sse: ServerSentEvent) -> Event:
    try:
        payload = json.loads(sse.data)
    except ValueError as error:
        raise InvalidResponse(f"an event is not JSON: {sse.data[:60]!r}") from error
    return decode(Event, _with_all(payload))


def _over(job: Job, persona: Persona) -> bool:
    return persona.job is None or persona.job.id != job.id or persona.job.ended


def _finished(persona: Persona, ending: Event | None) -> Persona:
    job = persona.job
    how = ending.type if ending is not None else job.status if job is not None else "succeeded"
    if how == "cancelled":
        raise SculptCancelled(persona.id)
    if how == "failed":
        reason = (ending.error if ending is not None else None) or (job.error if job is not None else None)
        raise SculptFailed(persona.id, reason or "the server gave no reason")
    return persona


def download_mask(persona_id: str, *, version: int | None = None) -> Call[bytes]:
    """A version's mask file (safetensors), the serving one by default. Raises NotFound."""
    params = {} if version is None else {"version": str(version)}
    return (yield from send(Request("GET", _path(persona_id, "/mask"), params=params))).content


def download_attached(persona_id: str, *, version: int | None = None) -> Call[bytes]:
    """The weights that a version of recovery `lora` or `full` has beside its mask (safetensors).

    Raises NotFound, also where a version has none.
    """
    params = {} if version is None else {"version": str(version)}
    return (yield from send(Request("GET", _path(persona_id, "/attached"), params=params))).content


def upload_mask(persona_id: str, mask: bytes | Path) -> Call[Persona]:
    """Install a mask file as a new version. Raises BadRequest: damaged, or made for another base."""
    content = mask if isinstance(mask, bytes) else mask.read_bytes()
    headers = {"Content-Type": "application/octet-stream"}
    request = Request("PUT", _path(persona_id, "/mask"), body=content, headers=headers, repeatable=False)
    return _persona((yield from send(request)).json())


def report(persona_id: str, *, version: int | None = None) -> Call[Report | None]:
    """A version's fidelity report, the serving one's by default; None for a mask that was uploaded.

    Raises NotFound.
    """
    params = {} if version is None else {"version": str(version)}
    payload = (yield from send(Request("GET", _path(persona_id, "/report"), params=params))).json()
    return None if payload is None else decode(Report, _with_all(payload))


def examples(persona_id: str, *, version: int | None = None) -> Call[list[Example]]:
    """The synthesised questions and answers a version was learned from. Raises NotFound."""
    params = {} if version is None else {"version": str(version)}
    payload = (yield from send(Request("GET", _path(persona_id, "/examples"), params=params))).json()
    return [decode(Example, one) for one in listed(payload)]


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _with_all(payload: Any) -> Any:
    """The payload with the whole of itself under `data`, for records that keep what they do not name."""
    return {**payload, "data": payload} if isinstance(payload, dict) else payload


def _path(persona_id: str, call: str = "") -> str:
    return f"/personas/{segment(persona_id, 'the persona id')}{call}"


def _persona(payload: Any) -> Persona:
    """A persona as itself, or as the answer of a call that queued a job: `{persona, job, urls}`."""
    if isinstance(payload, dict) and isinstance(payload.get("persona"), dict):
        payload = payload["persona"] | ({"job": payload["job"]} if payload.get("job") else {})
    return decode(Persona, payload)
