"""Decoding steps as CUDA graphs: what a step launches is recorded once and replayed with other numbers.

Row i of a graph is a token of KV slot i, so that attention reads keys where they lie; the rows of slots that do not
decode are nobody's. Not run on a GPU yet: the tests hold everything but the capture itself to the eager step.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakSet

import torch

from masquerade_engine.attention import SlotAttention
from masquerade_engine.decoder import Decoder
from masquerade_engine.kv_cache import KVCache
from masquerade_kernels.packs import Pack
from masquerade_kernels.persona_ffn import FFNSegment, run_persona_ffn
from masquerade_kernels.rows import RowOps

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 64
_LEAST_KEYS = 256
# Keys that a replay may read for nothing, since all its rows read as many and slots may be empty; an eager step reads
# few. 8.6 GB for Llama-3.1-8B, 2.6 ms at 3.3 TB/s: about what the launches of an eager step take. Not measured.
_MAX_PADDING = 65_536

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records what a step launches; what it returns launches that again


class DecodeRow(NamedTuple):
    """One token that is decoded."""

    slot: int
    token_id: int
    position: int
    persona: int  # row of the coefficients


class _Key(NamedTuple):
    """What a graph is for."""

    num_rows: int
    num_keys: int
    pack: int  # its id, which the graph keeps
    has_personas: bool
    biased: bool


@dataclass(slots=True)
class _Graph:
    pack: Pack
    replay: Step | None = None  # None: wanted once so far


class DecodeGraphs:
    """The graphs of a runner, each captured when a step of its kind comes for the second time.

    A kind is a number of rows, a number of keys and a pack; both numbers are rounded up to one of a few. The least
    recently used go beyond `_MAX_GRAPHS`. All read and write the same tensors, and the coefficients where they lie.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        rows: RowOps,
        capture: Capture,
        *,
        num_slots: int,
        max_len: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._rows = rows
        self._capture: Capture | None = capture
        self._row_buckets = row_buckets(num_slots)
        self._key_buckets = key_buckets(max_len)
        self._inputs = torch.zeros(3, num_slots, dtype=torch.int64, device=device)  # token ids, positions, personas
        self._hidden = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()  # least recently used first

    def run(self, rows: Sequence[DecodeRow], segment: FFNSegment) -> torch.Tensor | None:
        """The last layer's normed output by slot, `[at least the greatest slot + 1, hidden]`, until the next run.

        None where the step is to be run eagerly: the first of its kind, or one whose rows are far apart. `segment` is
        of all rows, in any order.
        """
        key = self._key(rows, segment)
        if self._capture is None or self._padding(key, rows) > _MAX_PADDING:
            return None
        if key not in self._graphs:
            self._graphs[key] = _Graph(segment.pack)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return None
        self._graphs.move_to_end(key)
        self._fill(rows, key.num_rows)
        graph = self._graphs[key]
        if graph.replay is None:
            try:
                graph.replay = self._capture(self._step(key, segment))
            except RuntimeError:  # CUDA's, memory that is short among them: an eager step may do with less
                logger.exception("no CUDA graphs from now on: a step could not be captured")
                self._capture = None
                self._graphs.clear()
                return None
        graph.replay()
        return self._hidden[: key.num_rows]

    def keep(self, packs: Collection[Pack]) -> None:
        """Drop the graphs of all other packs, and with them their hold on those."""
        ids = {id(pack) for pack in packs}
        for key in [key for key in self._graphs if key.pack not in ids]:
            del self._graphs[key]

    def _key(self, rows: Sequence[DecodeRow], segment: FFNSegment) -> _Key:
        num_rows = _at_least(1 + max(row.slot for row in rows), self._row_buckets)
        num_keys = _at_least(1 + max(row.position for row in rows), self._key_buckets)
        return _Key(num_rows, num_keys, id(segment.pack), segment.personas is not None, segment.biased)

    @staticmethod
    def _padding(key: _Key, rows: Sequence[DecodeRow]) -> int:
        return key.num_rows * key.num_keys - sum(1 + row.position for row in rows)

    def _fill(self, rows: Sequence[DecodeRow], num_rows: int) -> None:
        """Put a step's numbers where the graphs read them."""
        token_ids, positions, personas = [0] * num_rows, [-1] * num_rows, [0] * num_rows
        for row in rows:
            token_ids[row.slot], positions[row.slot], personas[row.slot] = row[1:]
        self._inputs[:, :num_rows].copy_(torch.tensor([token_ids, positions, personas]))

    def _step(self, key: _Key, segment: FFNSegment) -> Step:
        """To run it twice changes nothing more: it writes the KV of the same tokens, and reads what came before."""
        token_ids, positions, personas = self._inputs[:, : key.num_rows]
        segments = [replace(segment, start=0, stop=key.num_rows, personas=personas if key.has_personas else None)]

        def step() -> None:
            attention = SlotAttention(self._kv, self._decoder.rotary, positions, key.num_keys)
            hidden = self._decoder.hidden(
                token_ids, attention, lambda layer, x: run_persona_ffn(x, layer, segments, self._rows)
            )
            self._hidden[: key.num_rows].copy_(hidden)

        return step


class CUDACapture:
    """Captures on one device; all graphs that are alive share one pool of memory.

    They may, because they run one after the other, and what a run leaves behind is copied out of that memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # A pool ends with its last graph, and cannot be used again then.
        pool = next((other.pool() for other in self._alive), None)
        # The stream that is current stays so: a capture that fails leaves its own one behind.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()  # compiles kernels and loads libraries, which a capture must not
            torch.cuda.current_stream().wait_stream(self._stream)
            # Packs are made in another thread meanwhile, which allocates and copies.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        self._alive.add(graph)
        return graph.replay


def graph_capture(device: torch.device) -> Capture | None:
    """How steps are captured there; None where they cannot be."""
    return CUDACapture(device) if device.type == "cuda" else None


def row_buckets(most: int) -> list[int]:
    """1, 2, 4, 8, multiples of 8, and `most`."""
    return [*(rows for rows in (1, 2, 4, *range(8, most, 8)) if rows < most), most]


def key_buckets(max_len: int) -> list[int]:
    """Powers of two from 256 on, and `max_len`."""
    powers = (_LEAST_KEYS << doublings for doublings in range(max_len.bit_length()))
    return [*(keys for keys in powers if keys < max_len), max_len]


def _at_least(number: int, buckets: Sequence[int]) -> int:
    return buckets[bisect_left(buckets, number)]
