"""The planner's thresholds, measured on the device and the weights that they are for."""

from __future__ import annotations

import time

import numpy as np
import torch

from masquerade_kernels.gathered import GatheredWeights, gathered_layer_pack
from masquerade_kernels.packs import Pack
from masquerade_kernels.persona_ffn import FFNSegment, run_persona_ffn
from masquerade_kernels.planner import RowCosts
from masquerade_kernels.rows import RowOps

_POINTS = (1, 16, 32, 64, 128, 256)
_REPEATS = 3  # the fastest counts: what else runs on the machine only ever adds
_LAYERS = 8  # taken in turn, so that not all of them are in the cache


@torch.inference_mode()
def measure_row_costs(
    dense: Pack,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: RowOps,
    gathered: GatheredWeights | None,
) -> RowCosts:
    """What a layer takes for a few numbers of rows: dense, and where packs gather, as a gathered one.

    A third of a second on SmolLM2-135M.
    """

    def curve(pack: Pack) -> tuple[tuple[int, float], ...]:
        _microseconds(pack, torch.zeros(1, hidden_size, dtype=dtype, device=device), rows)
        points: list[tuple[int, float]] = []
        for num_rows in _POINTS:
            hidden = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)
            fastest = min(_microseconds(pack, hidden, rows) for _ in range(_REPEATS)) / pack.fraction
            points.append((num_rows, max(fastest, points[-1][1] if points else 0.0)))
        return tuple(points)

    return RowCosts(
        curve(dense),
        per_segment=_segment_cost(dtype, device, hidden_size),
        gathered=() if gathered is None else curve(_every_other_neuron(gathered)),
    )


def _every_other_neuron(weights: GatheredWeights) -> Pack:
    """A gathered pack of the usual size: what launches take beside the neurons is in its share."""
    num_neurons = len(weights.layers[0].down_t)
    neurons = np.arange(0, num_neurons, 2, dtype=np.int32)
    layers = tuple(gathered_layer_pack(layer, neurons) for layer in weights.layers)
    return Pack(layers, (), len(neurons) / num_neurons)


def _microseconds(pack: Pack, hidden: torch.Tensor, rows: RowOps) -> float:
    """Of one layer."""
    layers = range(len(pack.layers))[:: max(1, len(pack.layers) // _LAYERS)][:_LAYERS]
    segments = [FFNSegment(0, len(hidden), pack)]
    _wait(hidden.device)
    began = time.perf_counter()
    for layer in layers:
        run_persona_ffn(hidden, layer, segments, rows)
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
