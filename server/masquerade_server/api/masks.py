"""`/personas/{id}/mask`, `/report` and `/examples`: what a version is made of."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, Response

from masquerade_masks import SettingError
from masquerade_server.api.personas import DeskDep
from masquerade_server.bodies import MAX_MASK_BYTES, read_limited
from masquerade_server.views import persona_json

router = APIRouter(prefix="/personas", tags=["masks"])

VersionNumber = Annotated[int | None, Query(ge=1, le=2**31)]


@router.get("/{persona_id}/mask", response_class=Response)
async def download_mask(request: Request, persona_id: str, desk: DeskDep, version: VersionNumber = None) -> Response:
    """A version's mask file (safetensors), the serving one by default; its ETag is the digest."""
    found = await asyncio.to_thread(desk.version, persona_id, version)
    headers = {
        "etag": f'"{found.digest}"',
        "content-disposition": f'attachment; filename="{persona_id}-v{found.number}.safetensors"',
    }
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    data = await asyncio.to_thread(desk.mask_bytes, found)
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.get("/{persona_id}/attached", response_class=Response)
async def download_attached(
    request: Request, persona_id: str, desk: DeskDep, version: VersionNumber = None
) -> Response:
    """The weights beside a version's mask (safetensors), the serving one's by default; its ETag is their digest."""
    found = await asyncio.to_thread(desk.version, persona_id, version)
    headers = {"etag": f'"{found.attached}"'}
    if found.attached and request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    path = await asyncio.to_thread(desk.attached_path, found)
    name = f"{persona_id}-v{found.number}-{found.recovery}.safetensors"
    return FileResponse(path, media_type="application/octet-stream", headers=headers, filename=name)


@router.put("/{persona_id}/mask")
async def upload_mask(request: Request, persona_id: str, desk: DeskDep) -> dict[str, Any]:
    """Publish a mask file made for this base as the next version, and serve it.

    Attached weights that it names must be those of a version here.
    """
    data = await read_limited(request, MAX_MASK_BYTES)
    if not data:
        raise SettingError("mask", "the body is empty: send the bytes of a mask file")
    await asyncio.to_thread(desk.install_mask, persona_id, data)
    return persona_json(await asyncio.to_thread(desk.facts, persona_id))


@router.get("/{persona_id}/report")
async def get_report(persona_id: str, desk: DeskDep, version: VersionNumber = None) -> Any:
    """A version's fidelity report, the serving one's by default; null for a mask that was uploaded."""
    found = await asyncio.to_thread(desk.version, persona_id, version)
    return await asyncio.to_thread(desk.report, found)


@router.get("/{persona_id}/examples")
async def get_examples(
    persona_id: str,
    desk: DeskDep,
    version: VersionNumber = None,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> dict[str, Any]:
    """The synthesised questions and answers that a version was learned from, with their sensitivity."""
    found = await asyncio.to_thread(desk.version, persona_id, version)
    return {"data": await asyncio.to_thread(desk.examples, found, offset, limit)}
