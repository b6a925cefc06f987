"""Which personas' compact packs deserve memory: policy over plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

_HALF_LIFE_S = 300.0  # a persona that was busy five minutes ago counts half
_MARGIN = 1.5  # a newcomer is this much busier than the packs it drives out, or packs would chase each other


@dataclass(slots=True)
class _Use:
    count: float
    at: float  # seconds


@dataclass(slots=True)
class ResidencyPolicy:
    """Keeps the packs of the busiest personas within `budget` bytes."""

    budget: int
    clock: Callable[[], float]
    _uses: dict[str, _Use] = field(default_factory=dict)

    def touch(self, digest: str) -> None:
        """A request of this persona has come."""
        self._uses[digest] = _Use(self.busyness(digest) + 1.0, self.clock())
        if len(self._uses) > 4096:  # far beyond what any budget holds
            for stale in sorted(self._uses, key=self.busyness)[:2048]:
                del self._uses[stale]

    def busyness(self, digest: str) -> float:
        """Requests of this persona, each counting less as it ages."""
        use = self._uses.get(digest)
        return 0.0 if use is None else use.count * 0.5 ** ((self.clock() - use.at) / _HALF_LIFE_S)

    def victims(self, digest: str, num_bytes: int, resident: Mapping[str, int]) -> Collection[str] | None:
        """The resident packs (digest to bytes) to drop so that this one fits; None where it must stay out."""
        excess = sum(resident.values()) + num_bytes - self.budget
        victims: list[str] = []
        for other in sorted(resident, key=self.busyness):
            if excess <= 0:
                break
            victims.append(other)
            excess -= resident[other]
        if excess > 0:
            return None
        deserved = self.busyness(digest) > _MARGIN * sum(self.busyness(other) for other in victims)
        return victims if deserved or not victims else None
