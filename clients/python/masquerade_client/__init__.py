"""Client for a Masquerade server.

from masquerade_client import Masquerade

with Masquerade() as client:
    for event in client.personas.sculpt(name="Mira", text="A lighthouse keeper who ..."):
        print(event.stage, event.completed, event.total)
    print(client.chat.complete("mira", "What did you see last night?").text)
"""

from .client import AsyncMasquerade, Masquerade
from .errors import (
    APIConnectionError,
    APIError,
    APITimeout,
    AuthenticationError,
    BadRequest,
    Conflict,
    InvalidResponse,
    InvalidSetting,
    MasqueradeError,
    NotFound,
    RateLimited,
    SculptCancelled,
    SculptFailed,
    ServerError,
)
from .options import Sampling, SculptOptions
from .records import (
    ChatCompletion,
    Choice,
    Chunk,
    Estimate,
    Event,
    Example,
    Job,
    MaskInfo,
    MaskPair,
    MaskUnion,
    Message,
    Model,
    Overlap,
    Persona,
    Readiness,
    Report,
    Usage,
    Version,
    WarmPersona,
)
from .runners import AsyncStream, Stream

__all__ = [
    "APIConnectionError",
    "APIError",
    "APITimeout",
    "AsyncMasquerade",
    "AsyncStream",
    "AuthenticationError",
    "BadRequest",
    "ChatCompletion",
    "Choice",
    "Chunk",
    "Conflict",
    "Estimate",
    "Event",
    "Example",
    "InvalidResponse",
    "InvalidSetting",
    "Job",
    "MaskInfo",
    "MaskPair",
    "MaskUnion",
    "Masquerade",
    "MasqueradeError",
    "Message",
    "Model",
    "NotFound",
    "Overlap",
    "Persona",
    "RateLimited",
    "Readiness",
    "Report",
    "Sampling",
    "SculptCancelled",
    "SculptFailed",
    "SculptOptions",
    "ServerError",
    "Stream",
    "Usage",
    "Version",
    "WarmPersona",
]
