"""The forward context: what one forward pass tells the seams.

transformers hands extra keyword arguments to attention but never to the MLP, so attention, FFN and norms
read one context that whoever runs the pass (the runner, the pruner, an oracle) sets around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from masquerade_engine.seams import PersonaFFN, RMSNorm


class ForwardContext(Protocol):
    """One forward pass's answer to "how do I attend, and through which neurons do I go?"."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [batch, heads, tokens, head_dim], rotated
        key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim], rotated
        value: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Return the attended values, `[batch, tokens, heads, head_dim]`."""
        ...

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        """Return the FFN's output for `hidden` `[batch, tokens, hidden]`; `module.layer` says where."""
        ...

    def norm(self, module: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` `[..., width]` by its root mean square over the last dimension, times the norm's weight."""
        ...


_active: ContextVar[ForwardContext | None] = ContextVar("masquerade_forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the one that the seams of this thread's passes read."""
    token = _active.set(context)
    try:
        yield
    finally:
        _active.reset(token)


def active_context() -> ForwardContext:
    """The context of the running pass.

    Raises `LookupError` where a model with seams is run outside `forward_context`.
    """
    context = _active.get()
    if context is None:
        raise LookupError("a model with persona seams runs inside `with forward_context(...)` only")
    return context
