"""Packs of personas and casts, materialised in the background within a byte budget."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from masquerade_engine.residency import ResidencyPolicy
from masquerade_kernels.packs import FFNWeights, Pack, PackFormat, member_pack, pack_bytes, union_fraction
from masquerade_kernels.planner import PackFacts
from masquerade_masks import SubNetwork, WeightsTooLarge

logger = logging.getLogger(__name__)

_CAST = "cast:"  # before a cast's name in its pack's key; digests are hexadecimal
_MAX_BUSY = 128  # personas of a cast whose masks are kept at hand for its pack
_MAX_CASTS = 64  # casts that are followed, those asked for last
# A cast is looked at again when its members change, but not before this many times what the last look, or its pack,
# took have passed: new faces in a crowd must not keep a thread busy for good.
_REST = 20.0
_Work = Callable[[], None]  # for the background thread

Loading = Literal["loaded", "loading", "failed"]


class _GivenUp(Exception):
    """Nobody wants the pack in hand any more."""


@dataclass(frozen=True, slots=True)
class Resident:
    """The packs that are ready: a snapshot that later changes do not touch."""

    packs: Mapping[str, Pack] = field(default_factory=dict)
    facts: Mapping[str, PackFacts] = field(default_factory=dict)

    def with_pack(self, key: str, pack: Pack) -> Resident:
        assert pack.members is not None
        facts = PackFacts(frozenset(pack.members), pack.fraction)
        return Resident({**self.packs, key: pack}, {**self.facts, key: facts})

    def without(self, keys: Sequence[str]) -> Resident:
        return Resident(
            {key: pack for key, pack in self.packs.items() if key not in keys},
            {key: facts for key, facts in self.facts.items() if key not in keys},
        )


@dataclass(slots=True)
class _Cast:
    """The busy personas of one cast, and when its pack may be made again."""

    busy: OrderedDict[str, SubNetwork] = field(default_factory=OrderedDict)  # least recently asked for first
    members: tuple[str, ...] = ()  # of the pack that is resident or promised
    rests_until: float = 0.0  # seconds on the cache's clock
    ordered: bool = False


class PackCache:
    """Resident packs: a persona's under its digest, a cast's under `cast:<name>`.

    Most packs only save time. That of a persona with FFN weights of its own (`full`) alone computes it: from the first
    request that needs it to the end of the last, it is made as soon as there is memory, and stays. Where packs are
    gathered, those with low-rank updates are in none.
    Any thread may call; none waits for a pack to be made, but in `wait`.
    """

    def __init__(self, weights: FFNWeights, budget: int, form: PackFormat) -> None:
        self._weights = weights
        self._form = form
        self._policy = ResidencyPolicy(budget, time.monotonic)
        self._changed = threading.Condition()
        self._resident = Resident()
        self._sizes: dict[str, tuple[tuple[str, ...], int]] = {}  # members and bytes, of resident and promised packs
        self._casts: OrderedDict[str, _Cast] = OrderedDict()  # least recently asked for first
        self._orders: deque[tuple[str, list[SubNetwork]]] = deque()
        self._needed: dict[str, SubNetwork] = {}  # personas with own weights that live requests are of
        self._failed: set[str] = set()  # of these, whose packs could not be made
        self._dropped: set[str] = set()  # of these, to be discarded when they are needed no more
        self._maker: threading.Thread | None = None
        self._closed = False

    @property
    def resident(self) -> Resident:
        """The packs that are ready now."""
        return self._resident

    @property
    def num_bytes(self) -> int:
        """What resident and promised packs hold."""
        return sum(size for _, size in list(self._sizes.values()))

    def want(self, subnetwork: SubNetwork, cast: str) -> None:
        """A request of this persona has come: have the packs made that deserve the memory."""
        with self._changed:
            if self._closed:
                return
            self._policy.touch(subnetwork.digest)
            self._dropped.discard(subnetwork.digest)
            if not self._form.holds(subnetwork):
                return
            if subnetwork.digest not in self._sizes:
                self._order(subnetwork.digest, [subnetwork])
            if subnetwork.has_own_ffn:
                self._wake()
                return
            known = self._followed(cast)
            known.busy[subnetwork.digest] = subnetwork
            known.busy.move_to_end(subnetwork.digest)
            if len(known.busy) > _MAX_BUSY:
                known.busy.popitem(last=False)
            if subnetwork.digest not in known.members:
                known.ordered = True
            self._wake()

    def check_room(self, subnetwork: SubNetwork) -> None:
        """Raise `WeightsTooLarge` where a persona's own weights could never be resident."""
        num_bytes = pack_bytes([subnetwork], self._form)
        if num_bytes > self._policy.budget:
            raise WeightsTooLarge(num_bytes, self._policy.budget)

    def need(self, personas: Mapping[str, SubNetwork]) -> None:
        """The personas with weights of their own that live requests are of, by digest: their packs are to be here."""
        with self._changed:
            gone = self._needed.keys() - personas.keys()
            self._needed = dict(personas)
            self._failed -= gone
            self._discard([digest for digest in gone if digest in self._dropped])
            self._dropped -= gone
            for digest, persona in personas.items():
                if digest not in self._sizes and digest not in self._failed and not self._closed:
                    self._order(digest, [persona])
            self._wake()

    def loading(self, digest: str) -> Loading:
        """Whether the pack of a persona with weights of its own is resident, to come, or could not be made."""
        if digest in self._resident.packs:
            return "loaded"
        return "failed" if digest in self._failed else "loading"

    def wait(self, timeout_s: float) -> None:
        """Until a pack is made or given up, at most so long."""
        with self._changed:
            self._changed.wait(timeout_s)

    def drop(self, digest: str) -> None:
        """This function is no longer served: its memory is for others.

        What still runs it goes on densely; where its weights are its own, they go with its last request.
        """
        with self._changed:
            if digest in self._needed:
                self._dropped.add(digest)
                return
            self._discard([digest])
            for name, cast in list(self._casts.items()):
                if cast.busy.pop(digest, None) is not None:
                    cast.ordered = True
                if not cast.busy:
                    self._discard([_cast_key(name)])
                    del self._casts[name]
            self._wake()

    def residency(self, digest: str) -> str | None:
        """`compact` or `cast`, whichever is resident; None where neither is."""
        facts = self._resident.facts
        if digest in facts:
            return "compact"
        return "cast" if any(digest in pack.members for pack in facts.values()) else None

    def close(self) -> None:
        """Stop the background thread within a layer's time, and drop all packs."""
        with self._changed:
            self._closed = True
            maker, self._maker = self._maker, None
            self._changed.notify_all()
        if maker is not None:
            maker.join()
        self._resident = Resident()

    # With the lock held.

    def _order(self, key: str, members: list[SubNetwork]) -> bool:
        """Promise a pack; False where it must stay out."""
        num_bytes = pack_bytes(members, self._form)
        digests = tuple(member.digest for member in members)
        others = {other: size for other, size in self._sizes.items() if other != key}
        must = key in self._needed
        victims = self._policy.victims(digests, num_bytes, others, needed=self._needed, must=must)
        if victims is None:
            return False
        self._discard(list(victims))
        self._sizes[key] = (digests, num_bytes)
        if must:
            self._orders.appendleft((key, members))
        else:
            self._orders.append((key, members))
        return True

    def _followed(self, name: str) -> _Cast:
        cast = self._casts.setdefault(name, _Cast())
        self._casts.move_to_end(name)
        if len(self._casts) > _MAX_CASTS:
            self._discard([_cast_key(next(iter(self._casts)))])
            self._casts.popitem(last=False)
        return cast

    def _discard(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._sizes.pop(key, None)
            cast = self._cast_of(key)
            if cast is not None:
                cast.members = ()
        if any(key in self._resident.packs for key in keys):
            self._resident = self._resident.without(keys)

    def _wake(self) -> None:
        if self._maker is None and not self._closed and (self._orders or self._due() is not None):
            self._maker = threading.Thread(target=self._make_packs, name="masquerade-packs", daemon=True)
            self._maker.start()
        self._changed.notify_all()

    def _due(self) -> tuple[float, str] | None:
        """The ordered cast whose rest ends first, and when."""
        return min(((cast.rests_until, name) for name, cast in self._casts.items() if cast.ordered), default=None)

    def _cast_of(self, key: str) -> _Cast | None:
        """The cast that a pack is of; None for a persona's own."""
        return self._casts.get(key.removeprefix(_CAST)) if key.startswith(_CAST) else None

    # In the background thread.

    def _make_packs(self) -> None:
        _make_way()
        while (work := self._next_work()) is not None:
            work()

    def _next_work(self) -> _Work | None:
        with self._changed:
            while not self._closed:
                if self._orders:
                    return partial(self._make, *self._orders.popleft())
                due = self._due()
                if due is None:
                    self._changed.wait()
                elif due[0] > time.monotonic():
                    self._changed.wait(due[0] - time.monotonic())
                else:
                    cast = self._casts[due[1]]
                    cast.ordered = False
                    return partial(self._look_at, due[1], dict(cast.busy))
        return None

    def _look_at(self, name: str, busy: Mapping[str, SubNetwork]) -> None:
        """Order a cast's pack of those of its `busy` personas that it should unite, or have none."""
        began, key = time.monotonic(), _cast_key(name)
        members = self._policy.cast_members(busy, lambda digests: union_fraction([busy[one] for one in digests]))
        with self._changed:
            cast = self._casts.get(name)
            if cast is None:
                return
            self._rest(cast, began)
            if not members:
                self._discard([key])
            elif set(members) != set(cast.members) and self._order(key, [busy[digest] for digest in members]):
                cast.members = tuple(members)

    def _rest(self, cast: _Cast, began: float) -> None:
        now = time.monotonic()
        cast.rests_until = now + _REST * (now - began)

    def _make(self, key: str, members: list[SubNetwork]) -> None:
        wanted = tuple(member.digest for member in members)

        def is_wanted() -> bool:
            return not self._closed and self._sizes.get(key, ((), 0))[0] == wanted

        began = layer_began = time.monotonic()

        def make_way() -> None:
            nonlocal layer_began
            if not is_wanted():
                raise _GivenUp
            time.sleep(time.monotonic() - layer_began)  # half of the time is the engine's, whatever the cores
            layer_began = time.monotonic()

        try:
            if not is_wanted():
                return
            pack = member_pack(self._weights, members, self._form, make_way)
        except _GivenUp:
            return
        except Exception:  # the personas stay on the packs that cover them, which compute the same
            logger.exception("no pack for %s", key)
            with self._changed:
                self._discard([key])
                if key in self._needed:
                    self._failed.add(key)
                self._changed.notify_all()
            return
        with self._changed:
            if is_wanted():
                self._resident = self._resident.with_pack(key, pack)
            self._changed.notify_all()
            cast = self._cast_of(key)
            if cast is not None:
                self._rest(cast, began)


def _cast_key(name: str) -> str:
    return _CAST + name


def _make_way() -> None:
    """Give this thread the lowest priority, where the system has one a thread, and no pool of others.

    More pool threads than cores would have the engine's sleep at every barrier.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
