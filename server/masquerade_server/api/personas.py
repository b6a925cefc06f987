"""`/personas`: create, list, change, roll back, delete, cancel."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import JSONResponse, Response

from masquerade_server.bodies import describe_body, json_body
from masquerade_server.generation import CLIENT_CLOSED_REQUEST, ClientGone, until_disconnect
from masquerade_server.middleware import note
from masquerade_server.personas import PersonaDesk
from masquerade_server.schemas import ID_PATTERN, PersonaBody, PersonaPatch, RollbackBody, WarmBody
from masquerade_server.state import Backend, BackendDep, ServerState, StateDep
from masquerade_server.views import job_json, persona_json, urls
from masquerade_server.warming import targets_of, warm_all

router = APIRouter(prefix="/personas", tags=["personas"])


def persona_desk(state: StateDep, backend: BackendDep) -> PersonaDesk:
    """The desk of a request; it holds nothing of its own."""
    return PersonaDesk(backend, state.registry, state.files, remote_teacher=state.settings.teacher is not None)


DeskDep = Annotated[PersonaDesk, Depends(persona_desk)]
PageSize = Annotated[int, Query(ge=1, le=200)]


@router.post("", status_code=202, openapi_extra=describe_body(PersonaBody))
async def create_persona(
    state: StateDep,
    backend: BackendDep,
    desk: DeskDep,
    body: Annotated[PersonaBody, Depends(json_body(PersonaBody))],
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Create a persona and queue its sculpt; it answers at once, from the unpruned base.

    202 where a sculpt was queued, 201 with `sculpt: false`; with `dry_run`, 200 and an estimate, and
    nothing is created. 409 where the sculpt would not fit the device that it would run on.
    """
    if body.dry_run:
        await asyncio.to_thread(desk.check, body)
        waiting = await asyncio.to_thread(desk.queue_length)
        found = await state.estimator.estimate(body, behind_others=waiting > 0)
        return JSONResponse(found | {"queue_position": waiting})
    if body.sculpt:
        await _check_memory(state, backend, desk, body)
    persona, job = await asyncio.to_thread(desk.create, body, idempotency_key)
    headers = {"location": f"/personas/{persona.id}"}
    return await _accepted(desk, persona.id, 201 if job is None else 202, headers)


@router.get("")
async def list_personas(
    desk: DeskDep,
    limit: PageSize = 50,
    after: Annotated[str | None, Query(max_length=63)] = None,
    cast: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> dict[str, Any]:
    """Personas by id; `next` is the `after` of the next page, null on the last."""
    page, cursor = await asyncio.to_thread(desk.page, limit, after, cast)
    return {"data": [persona_json(facts) for facts in page], "next": cursor}


@router.post("/warm", openapi_extra=describe_body(WarmBody))
async def warm_personas(
    http: Request, backend: BackendDep, body: Annotated[WarmBody, Depends(json_body(WarmBody))]
) -> Response:
    """Make prompts and weights ready now (a player enters a town); answers once they are.

    A client that goes away stops what is left of it.
    """
    targets = await asyncio.to_thread(targets_of, backend, body.ids)
    try:
        warmed = await until_disconnect(http, warm_all(backend, targets, pin=body.pin))
    except ClientGone:
        note(http.scope, "client gone")
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse({"object": "list", "data": [asdict(one) for one in warmed]})


@router.get("/{persona_id}")
async def get_persona(persona_id: str, desk: DeskDep) -> dict[str, Any]:
    """One persona, with versions, job, report and residency."""
    return persona_json(await asyncio.to_thread(desk.facts, persona_id, with_report=True))


@router.patch("/{persona_id}", openapi_extra=describe_body(PersonaPatch))
async def update_persona(
    persona_id: str,
    state: StateDep,
    backend: BackendDep,
    desk: DeskDep,
    patch: Annotated[PersonaPatch, Depends(json_body(PersonaPatch))],
) -> Response:
    """Change a persona: 202 where a new version is sculpted, 200 where the mask is kept; 409 as for `POST`."""
    if patch.sculpt is not False:
        await _check_memory(state, backend, desk, await asyncio.to_thread(desk.body_after, persona_id, patch))
    _, job = await asyncio.to_thread(desk.update, persona_id, patch)
    return await _accepted(desk, persona_id, 200 if job is None else 202, {})


@router.post("/{persona_id}/rollback", openapi_extra=describe_body(RollbackBody, required=False))
async def roll_back(
    persona_id: str,
    desk: DeskDep,
    body: Annotated[RollbackBody, Depends(json_body(RollbackBody, optional=True))],
) -> dict[str, Any]:
    """Serve an earlier version again, with its text; without `version`, the one before the present."""
    await asyncio.to_thread(desk.rollback, persona_id, body.version)
    return persona_json(await asyncio.to_thread(desk.facts, persona_id))


@router.delete("/{persona_id}")
async def delete_persona(persona_id: str, desk: DeskDep) -> dict[str, Any]:
    """Gone at once; requests in flight finish."""
    await asyncio.to_thread(desk.delete, persona_id)
    return {"id": persona_id, "deleted": True}


@router.post("/{persona_id}/cancel")
async def cancel_sculpt(persona_id: str, desk: DeskDep) -> dict[str, Any]:
    """Stop the sculpt: at once where it is queued, within a step where it runs."""
    job = await asyncio.to_thread(desk.cancel, persona_id)
    return {"job": job_json(job)}


async def _check_memory(state: ServerState, backend: Backend, desk: PersonaDesk, body: PersonaBody) -> None:
    """Raises `InsufficientMemory` for a sculpt that the worker could not hold."""
    if state.estimator.need_not_ask(body, backend.base):
        return
    waiting = await asyncio.to_thread(desk.queue_length)
    await state.estimator.estimate(body, behind_others=waiting > 0)


async def _accepted(desk: PersonaDesk, persona_id: str, status: int, headers: dict[str, str]) -> Response:
    """`{persona, job, urls}`."""
    persona = persona_json(await asyncio.to_thread(desk.facts, persona_id))
    content = {"persona": persona, "job": persona["job"], "urls": urls(persona_id)}
    return JSONResponse(content, status_code=status, headers=headers)
