"""The planner's thresholds, measured on the device and the weights that they are for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from masquerade_kernels.packs import LayerPack
from masquerade_kernels.planner import RowCosts
from masquerade_kernels.rows import RowOps

_POINTS = (1, 16, 32, 64, 128, 256)
_REPEATS = 3  # the fastest counts: what else runs on the machine only ever adds
_LAYERS = 8  # taken in turn, so that not all of them are in the cache


@torch.inference_mode()
def measure_row_costs(layers: Sequence[LayerPack], dtype: torch.dtype, device: torch.device, rows: RowOps) -> RowCosts:
    """What a dense layer takes for a few numbers of rows; a third of a second on SmolLM2-135M."""
    taken = layers[:: max(1, len(layers) // _LAYERS)][:_LAYERS]
    _microseconds(taken, torch.zeros(1, taken[0].gate_up.in_features, dtype=dtype, device=device), rows)
    points: list[tuple[int, float]] = []
    for num_rows in _POINTS:
        hidden = torch.zeros(num_rows, taken[0].gate_up.in_features, dtype=dtype, device=device)
        fastest = min(_microseconds(taken, hidden, rows) for _ in range(_REPEATS))
        points.append((num_rows, max(fastest, points[-1][1] if points else 0.0)))
    return RowCosts(tuple(points), per_segment=_segment_cost(dtype, device, taken[0].gate_up.in_features))


def _microseconds(layers: Sequence[LayerPack], hidden: torch.Tensor, rows: RowOps) -> float:
    """Of one layer."""
    _wait(hidden.device)
    began = time.perf_counter()
    for layer in layers:
        layer.down(rows.swiglu(layer.gate_up(hidden), None, None))
    _wait(hidden.device)
    return 1e6 * (time.perf_counter() - began) / len(layers)


def _segment_cost(dtype: torch.dtype, device: torch.device, hidden_size: int) -> float:
    """Microseconds to put the outputs of two segments together."""
    halves = [torch.zeros(16, hidden_size, dtype=dtype, device=device)] * 2
    times = []
    for _ in range(_REPEATS):
        _wait(device)
        began = time.perf_counter()
        torch.cat(halves)
        _wait(device)
        times.append(1e6 * (time.perf_counter() - began))
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
