"""`GET /v1/models`: the base and every persona, as names that `model` accepts."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from masquerade_server.openai_shapes import model_object
from masquerade_server.personas import PersonaDesk
from masquerade_server.state import Backend, BackendDep, ServerState, StateDep

if TYPE_CHECKING:
    from masquerade_masks.registry import Persona

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(state: StateDep, backend: BackendDep) -> dict[str, Any]:
    """The base first, then the personas by id."""
    return {"object": "list", "data": await asyncio.to_thread(_all_models, state, backend)}


@router.get("/v1/models/{model}")
async def get_model(model: str, state: StateDep, backend: BackendDep) -> dict[str, Any]:
    """One model; `id@3` and `id@dense` are names of a model too."""
    return await asyncio.to_thread(_one_model, model, state, backend)


def _all_models(state: ServerState, backend: Backend) -> list[dict[str, Any]]:
    desk = PersonaDesk(backend, state.registry, state.files)
    return [_base(backend), *(_persona(persona.id, persona, backend) for persona in desk.every())]


def _one_model(model: str, state: ServerState, backend: Backend) -> dict[str, Any]:
    target = backend.catalogue.target(model)
    if target.persona_id is None:
        return _base(backend)
    return _persona(model, state.registry.get_persona(target.persona_id), backend)


def _base(backend: Backend) -> dict[str, Any]:
    return model_object(backend.base.name, backend.started, root=backend.base.name)


def _persona(model: str, persona: Persona, backend: Backend) -> dict[str, Any]:
    created = int(datetime.fromisoformat(persona.created).timestamp())
    return model_object(model, created, root=persona.id, parent=backend.base.name)
