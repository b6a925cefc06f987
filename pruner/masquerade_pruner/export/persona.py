"""Whom an export carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExportedPersona:
    """What an export tells about its persona beside the weights."""

    id: str
    version: int
    system_prompt: str | None = None  # None: not known, so chats bring their own
