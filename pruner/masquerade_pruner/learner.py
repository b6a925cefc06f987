"""The base as learning runs it: the weights that are served, in the type that the processor multiplies fastest."""

from __future__ import annotations

import torch

from masquerade_engine.base import Base


def build_learner(base: Base) -> torch.nn.Module:
    """The base with plain linears, which gradients flow through; frozen.

    Widened after it is rounded to the base's type: a checkpoint may hold more digits than are served.
    """
    return base.build_model().to(learning_dtype(base))


def learning_dtype(base: Base) -> torch.dtype:
    """The base's own, or float32 where that is faster than bf16: on Intel's processors without their matrix unit.

    Every bf16 number is a float32, so that nothing is lost but room.
    """
    if base.device.type == "cpu" and base.dtype is torch.bfloat16:
        from masquerade_kernels.cpu_dots import multiplies_float32_faster  # noqa: PLC0415  (numba: CUDA needs none)

        return torch.float32 if multiplies_float32_faster() else torch.bfloat16
    return base.dtype
