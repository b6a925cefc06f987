"""`/casts`, as operations."""

from __future__ import annotations

from .decode import decode
from .flow import Call, send
from .records import Overlap
from .wire import Request, segment


def overlap(cast: str = "default", *, n: int = 16) -> Call[Overlap]:
    """How much the masks of the `n` busiest personas of a cast have in common."""
    request = Request("GET", f"/casts/{segment(cast, 'the cast')}/overlap", params={"n": str(n)})
    return decode(Overlap, (yield from send(request)).json())
