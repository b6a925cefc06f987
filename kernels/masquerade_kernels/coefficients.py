"""Coefficients of the personas that are active now: one row per persona, read per token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch

from masquerade_kernels.lora import LoraLayer, lora_layer
from masquerade_masks import FFNShape, SubNetwork

BASE_ROW = 0


class CoefficientTable:
    """Float32 rows `[num_layers, num_rows, intermediate]`; row 0 is the base's ones.

    Low-rank updates come and go with their persona's row, in `dtype`, over every neuron.

    Rows belong to the personas used last and are overwritten in that order, so an idle persona holds none. The
    table doubles from 8 rows up to `max_personas + 1`, and `rows_of` is asked for at most `max_personas` at once. One
    that is `whole` has all rows from the start, where they stay: what was captured in a CUDA graph reads them.
    """

    def __init__(
        self,
        shape: FFNShape,
        max_personas: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        whole: bool = False,
    ) -> None:
        self._shape = shape
        self._dtype = dtype
        self._max_rows = max_personas + 1
        self._device = device
        self._row_of: OrderedDict[str, int] = OrderedDict()  # least recently used first
        num_rows = self._max_rows if whole else min(8, self._max_rows)
        self._scales = torch.ones(
            shape.num_layers, num_rows, shape.intermediate_size, dtype=torch.float32, device=device
        )
        self._biases: torch.Tensor | None = None  # [num_layers, num_rows, hidden], once a persona has any
        self._biased: set[str] = set()
        self._loras: dict[str, tuple[LoraLayer, ...]] = {}

    def rows_of(self, subnetworks: Iterable[SubNetwork]) -> dict[str, int]:
        """The rows of these personas by digest, written where they were not there."""
        wanted = {subnetwork.digest: subnetwork for subnetwork in subnetworks}
        assert len(wanted) < self._max_rows, "more personas in a step than sequences"
        for digest in wanted.keys() & self._row_of.keys():
            self._row_of.move_to_end(digest)
        for digest in wanted.keys() - self._row_of.keys():
            self._write(self._free_row(wanted), wanted[digest])
        return {digest: self._row_of[digest] for digest in wanted}

    def scales(self, layer: int) -> torch.Tensor:
        """Float32 `[num_rows, intermediate]`."""
        return self._scales[layer]

    def has_biases(self, digests: Iterable[str]) -> bool:
        """Whether any of these personas, which have rows, has biases."""
        return not self._biased.isdisjoint(digests)

    def biases(self, layer: int) -> torch.Tensor:
        """Float32 `[num_rows, hidden]`, once some persona has any."""
        assert self._biases is not None, "no persona has biases"
        return self._biases[layer]

    @property
    def loras(self) -> Mapping[str, tuple[LoraLayer, ...]]:
        """The low-rank updates of personas that have a row, by digest."""
        return self._loras

    @property
    def num_bytes(self) -> int:
        """Memory the table holds."""
        loras = sum(layer.num_bytes for lora in self._loras.values() for layer in lora)
        return self._scales.nbytes + (0 if self._biases is None else self._biases.nbytes) + loras

    def _free_row(self, wanted: dict[str, SubNetwork]) -> int:
        used = len(self._row_of) + 1
        if used < self._scales.shape[1]:
            return self._lowest_unused()
        if used < self._max_rows:
            self._grow(min(2 * used, self._max_rows))
            return used
        digest = next(digest for digest in self._row_of if digest not in wanted)
        self._biased.discard(digest)
        self._loras.pop(digest, None)
        return self._row_of.pop(digest)

    def _lowest_unused(self) -> int:
        taken = set(self._row_of.values())
        return next(row for row in range(1, self._scales.shape[1]) if row not in taken)

    def _grow(self, num_rows: int) -> None:
        self._scales = _with_rows(self._scales, num_rows, fill=1.0)
        if self._biases is not None:
            self._biases = _with_rows(self._biases, num_rows, fill=0.0)

    def _write(self, row: int, subnetwork: SubNetwork) -> None:
        assert not subnetwork.has_own_ffn, "own weights have a pack of their own"
        self._scales[:, row] = torch.from_numpy(subnetwork.coefficients()).to(self._device)
        biases = subnetwork.biases()
        if biases is not None:
            if self._biases is None:
                shape = (self._shape.num_layers, self._scales.shape[1], self._shape.hidden_size)
                self._biases = torch.zeros(shape, dtype=torch.float32, device=self._device)
            self._biases[:, row] = torch.from_numpy(biases).to(self._device)
            self._biased.add(subnetwork.digest)
        elif self._biases is not None:
            self._biases[:, row] = 0.0
        layers = [
            lora_layer(subnetwork, layer, None, self._dtype, self._device) for layer in range(self._shape.num_layers)
        ]
        lora = tuple(layer for layer in layers if layer is not None)
        if lora:
            self._loras[subnetwork.digest] = lora
        self._row_of[subnetwork.digest] = row


def _with_rows(table: torch.Tensor, num_rows: int, fill: float) -> torch.Tensor:
    grown = table.new_full((table.shape[0], num_rows, table.shape[2]), fill)
    grown[:, : table.shape[1]] = table
    return grown
