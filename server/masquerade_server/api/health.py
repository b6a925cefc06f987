"""`/healthz`: the process lives. `/readyz`: it can answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from masquerade_server.state import BackendDep

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, Any]:
    """Live, even while the base is being loaded."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(backend: BackendDep) -> dict[str, Any]:
    """200 once the base is loaded and chats are answered, 503 before."""
    base = backend.base
    return {
        "status": "ready",
        "model": base.name,
        "fingerprint": base.fingerprint,
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "max_model_len": backend.engine.max_model_len,
    }
