"""A base's FFN weights, layer by layer: out of a built model, or from its memory-mapped checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from masquerade_engine.seams import PersonaFFN
from masquerade_kernels.packs import FFNLayer

_PARTS = ("gate_proj", "up_proj", "down_proj")


class ModelWeights:
    """The weights of a model's FFN seams. Each layer's linears leave the model as they are read."""

    def __init__(self, ffns: Sequence[PersonaFFN]) -> None:
        self._ffns = ffns

    def layers(self) -> Iterator[FFNLayer]:
        for ffn in self._ffns:
            layer = FFNLayer(*(getattr(ffn, part).weight.detach() for part in _PARTS))
            for part in _PARTS:
                setattr(ffn, part, nn.Identity())
            yield layer


class CheckpointWeights:
    """The weights in a Hugging Face directory, read through the page cache and never held."""

    def __init__(self, directory: Path, num_layers: int) -> None:
        self._directory = directory
        self._num_layers = num_layers

    def layers(self) -> Iterator[FFNLayer]:
        with ExitStack() as files:
            opened: dict[str, Any] = {}
            for layer in range(self._num_layers):
                yield FFNLayer(*(self._tensor(files, opened, layer, part) for part in _PARTS))

    def _tensor(self, files: ExitStack, opened: dict[str, Any], layer: int, part: str) -> torch.Tensor:
        name = f"model.layers.{layer}.mlp.{part}.weight"
        file = self._file_of(name)
        if file not in opened:
            opened[file] = files.enter_context(safe_open(self._directory / file, framework="pt"))
        tensor: torch.Tensor = opened[file].get_tensor(name)
        return tensor

    def _file_of(self, name: str) -> str:
        index = self._directory / "model.safetensors.index.json"
        if not index.is_file():
            return "model.safetensors"
        return str(json.loads(index.read_text(encoding="utf-8"))["weight_map"][name])
