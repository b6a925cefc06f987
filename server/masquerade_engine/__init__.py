"""The inference engine: many personas in one ragged batch over one frozen base. No HTTP.

Names are imported on first use, so that requests, prompts and the scheduler are reached without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masquerade_engine.async_engine import AsyncEngine
    from masquerade_engine.base import Base, load_base
    from masquerade_engine.engine import Engine
    from masquerade_engine.prompt import ChatMessage, persona_system_prompt, prompt_sha256, render_chat
    from masquerade_engine.requests import (
        GenerationResult,
        PersonaFunction,
        Request,
        SamplingParams,
        TokenOutput,
        Warmed,
    )
    from masquerade_engine.settings import EngineSettings, EngineStats

__all__ = [
    "AsyncEngine",
    "Base",
    "ChatMessage",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "GenerationResult",
    "PersonaFunction",
    "Request",
    "SamplingParams",
    "TokenOutput",
    "Warmed",
    "load_base",
    "persona_system_prompt",
    "prompt_sha256",
    "render_chat",
]

_MODULES = {
    "AsyncEngine": "async_engine",
    "Base": "base",
    "ChatMessage": "prompt",
    "Engine": "engine",
    "EngineSettings": "settings",
    "EngineStats": "settings",
    "GenerationResult": "requests",
    "PersonaFunction": "requests",
    "Request": "requests",
    "SamplingParams": "requests",
    "TokenOutput": "requests",
    "Warmed": "requests",
    "load_base": "base",
    "persona_system_prompt": "prompt",
    "prompt_sha256": "prompt",
    "render_chat": "prompt",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
