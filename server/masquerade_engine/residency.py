"""Which packs deserve memory: policy over plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

_HALF_LIFE_S = 300.0  # a persona that was busy five minutes ago counts half
_MARGIN = 1.5  # a newcomer is this much busier than the packs it drives out, or packs would chase each other
_MAX_TRACKED = 4096  # personas; far beyond what any budget holds
# A cast's pack saves what its union leaves out, and above this share too little to be worth its memory.
_MAX_UNION = 0.9
_MIN_SHARE = 0.9  # of a cast's requests that its pack covers: a step with one row outside reads other weights as well
_MAX_MEMBERS = 64


@dataclass(slots=True)
class _Use:
    count: float
    at: float  # seconds


@dataclass(slots=True)
class ResidencyPolicy:
    """Keeps the packs of the busiest personas and casts within `budget` bytes."""

    budget: int
    clock: Callable[[], float]
    _uses: dict[str, _Use] = field(default_factory=dict)

    def touch(self, digest: str) -> None:
        """A request of this persona has come."""
        self._uses[digest] = _Use(self.busyness([digest]) + 1.0, self.clock())
        if len(self._uses) > _MAX_TRACKED:
            for stale in sorted(self._uses, key=lambda one: self.busyness([one]))[: _MAX_TRACKED // 2]:
                del self._uses[stale]

    def busyness(self, members: Collection[str]) -> float:
        """Requests of these personas, each counting less as it ages."""
        uses = [use for use in map(self._uses.get, members) if use is not None]
        return float(sum(use.count * 0.5 ** ((self.clock() - use.at) / _HALF_LIFE_S) for use in uses))

    def victims(
        self,
        members: Collection[str],
        num_bytes: int,
        resident: Mapping[str, tuple[Collection[str], int]],
        *,
        needed: Collection[str] = (),
        must: bool = False,
    ) -> Collection[str] | None:
        """The resident packs (key to members and bytes) to drop so that a new one of `members` fits.

        None where it must stay out. Those `needed` never go: there are requests that nothing else computes. One that
        `must` come for that reason need not be busier than what it drives out.
        """
        excess = sum(size for _, size in resident.values()) + num_bytes - self.budget
        if excess <= 0:
            return []
        victims: list[str] = []
        for key in sorted(resident.keys() - set(needed), key=lambda key: (self.busyness(resident[key][0]), key)):
            if excess <= 0:
                break
            victims.append(key)
            excess -= resident[key][1]
        if excess > 0:
            return None
        if must:
            return victims
        deserved = self.busyness(members) > _MARGIN * sum(self.busyness(resident[key][0]) for key in victims)
        return victims if deserved else None

    def cast_members(self, candidates: Collection[str], union: Callable[[Sequence[str]], float]) -> list[str]:
        """Whose masks a cast's pack should unite, the busiest first; empty where it would not pay.

        `union` tells the share of all neurons that some personas take together.
        """
        ranked = sorted(candidates, key=lambda one: -self.busyness([one]))[:_MAX_MEMBERS]
        if len(ranked) > 1 and union(ranked) > _MAX_UNION:
            low, high = 1, len(ranked)  # the most that stay within: the union only grows
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if union(ranked[:middle]) <= _MAX_UNION else (low, middle)
            ranked = ranked[:low]
        if len(ranked) < 2 or self.busyness(ranked) < _MIN_SHARE * self.busyness(candidates):
            return []
        return ranked
