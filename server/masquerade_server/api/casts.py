"""`GET /casts/{id}/overlap`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from masquerade_server.api.personas import DeskDep
from masquerade_server.schemas import ID_PATTERN

router = APIRouter(prefix="/casts", tags=["casts"])


@router.get("/{cast}/overlap")
async def cast_overlap(
    desk: DeskDep,
    cast: Annotated[str, Path(pattern=ID_PATTERN)],
    n: Annotated[int, Query(ge=2, le=64)] = 16,
) -> dict[str, Any]:
    """Pairwise Jaccard of the masks that serve, beside chance, and the union of the `n` busiest personas."""
    return await asyncio.to_thread(desk.overlap, cast, n)
