"""Compact packs, materialised in the background within a byte budget."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping

import torch

from masquerade_engine.residency import ResidencyPolicy
from masquerade_kernels.packs import FFNWeights, Pack, compact_bytes, compact_pack
from masquerade_masks import SubNetwork

logger = logging.getLogger(__name__)


class PackCache:
    """Resident compact packs by digest. Any thread may call; none waits for a pack to be made."""

    def __init__(self, weights: FFNWeights, budget: int, dtype: torch.dtype, device: torch.device) -> None:
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._policy = ResidencyPolicy(budget, time.monotonic)
        self._lock = threading.Lock()
        self._packs: dict[str, Pack] = {}  # replaced, never changed: readers hold a whole one
        self._bytes: dict[str, int] = {}  # of resident and of promised packs
        self._orders: queue.SimpleQueue[SubNetwork | None] = queue.SimpleQueue()
        self._maker: threading.Thread | None = None
        self._closed = False

    def resident(self) -> Mapping[str, Pack]:
        """The packs that are ready now; later changes do not show in it."""
        return self._packs

    def want(self, subnetwork: SubNetwork) -> None:
        """A request of this persona has come: have its pack made, if it deserves the memory."""
        digest, num_bytes = subnetwork.digest, compact_bytes(subnetwork, self._dtype)
        with self._lock:
            self._policy.touch(digest)
            if self._closed or digest in self._bytes:
                return
            victims = self._policy.victims(digest, num_bytes, self._bytes)
            if victims is None:
                return
            self._bytes = {key: n for key, n in self._bytes.items() if key not in victims} | {digest: num_bytes}
            self._packs = {key: pack for key, pack in self._packs.items() if key not in victims}
            if self._maker is None:
                self._maker = threading.Thread(target=self._make_packs, name="masquerade-packs", daemon=True)
                self._maker.start()
        self._orders.put(subnetwork)

    def drop(self, digest: str) -> None:
        """This function is no longer served: its memory is for others. What still runs it goes on densely."""
        with self._lock:
            self._bytes = {key: n for key, n in self._bytes.items() if key != digest}
            self._packs = {key: pack for key, pack in self._packs.items() if key != digest}

    @property
    def num_bytes(self) -> int:
        """What resident and promised packs hold."""
        return sum(self._bytes.values())

    def close(self) -> None:
        """Stop the background thread after the pack in hand, and drop all packs."""
        with self._lock:
            self._closed = True
            maker, self._maker = self._maker, None
        if maker is not None:
            self._orders.put(None)
            maker.join()
        self._packs = {}

    def _make_packs(self) -> None:
        while (subnetwork := self._orders.get()) is not None and not self._closed:
            self._make(subnetwork)

    def _make(self, subnetwork: SubNetwork) -> None:
        digest = subnetwork.digest
        if digest not in self._bytes:  # driven out before its turn came
            return
        try:
            pack = compact_pack(self._weights, subnetwork, dtype=self._dtype, device=self._device)
        except Exception:  # the persona stays on the dense pack, which computes the same
            logger.exception("no compact pack for %s", digest)
            with self._lock:
                self._bytes.pop(digest, None)
            return
        with self._lock:
            if digest in self._bytes and not self._closed:
                self._packs = self._packs | {digest: pack}
