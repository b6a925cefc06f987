"""Changed copies of modules that share every weight that was not changed."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_children(module: M, **children: nn.Module) -> M:
    """A shallow copy of `module` with some direct children replaced; the original keeps its own."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **children}
    return changed
