"""The HTTP routes, one module a subject."""

from fastapi import APIRouter

from masquerade_server.api import casts, chat, events, health, masks, models, personas

__all__ = ["routers"]


def routers() -> list[APIRouter]:
    """Every router, in the order of the API's documentation."""
    return [
        chat.router,
        models.router,
        personas.router,
        events.router,
        masks.router,
        casts.router,
        health.router,
    ]
