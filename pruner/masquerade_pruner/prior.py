"""The prior of a base: what its personas share, learned once, where every persona's learning starts.

Scores say which neurons personas keep; a shared recovery, what is trained on top of the mask of these scores for all
of them at once. `prior_learning.py` learns both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from masquerade_engine.base import Base
from masquerade_masks import FFNShape, MaskFormatError
from masquerade_pruner.changes import counted, moved

FORMAT = "masquerade.prior/1"
_KEPT = "kept"


@dataclass(frozen=True, slots=True)
class SharedRecovery:
    """`Change`'s tensors, and the neurons that they are of."""

    kept: torch.Tensor  # [layers, kept] int64, ascending in each layer
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Prior:
    """Scores by the number of neurons kept in a layer, fp32 `[layers, intermediate]` each, and shared recoveries."""

    scores: Mapping[int, torch.Tensor]
    rounds: int = 1  # of learning scores, each from the last one's
    recoveries: Mapping[tuple[int, str], SharedRecovery] = field(default_factory=dict)  # by neurons kept, and kind

    def digest(self, kept: int, kind: str = "none") -> str:
        """sha256 of what masks of `kept` neurons and recoveries of this kind start from: elsewhere, they end elsewhere.

        Scores of another number of neurons have no part in it.
        """
        scores, kind = str(_nearest(self.scores, kept)), _shared_kind(kind)
        known = [number for number, of_kind in self.recoveries if of_kind == kind]
        shared = f"{_nearest(known, kept)}/{kind}/" if known else None
        held = hashlib.sha256()
        for name, one in sorted(self.tensors().items()):
            if name == scores or (shared is not None and name.startswith(shared)):
                held.update(name.encode() + one.contiguous().numpy().tobytes())
        return held.hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a prior's file holds, by name."""
        named = {str(kept): one for kept, one in self.scores.items()}
        for (kept, kind), shared in self.recoveries.items():
            of_kind = {_KEPT: shared.kept.to(torch.int32), **shared.tensors}
            named |= {f"{kept}/{kind}/{name}": one for name, one in of_kind.items()}
        return named

    def at(self, kept: int) -> torch.Tensor:
        """The scores learned for the nearest number of kept neurons."""
        return self.scores[_nearest(self.scores, kept)]

    def recovery(self, kind: str, kept: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """A recovery of this kind for the mask that keeps these neurons, `[layers, kept]`; None where none is known.

        For `full` it is that of `lora`, which own weights can take up. Of those learned it is the one for the nearest
        number of neurons; what it has not seen has no part in it.
        """
        kind = _shared_kind(kind)
        known = [number for number, of_kind in self.recoveries if of_kind == kind]
        if not known:
            return None
        shared = self.recoveries[_nearest(known, kept.shape[1]), kind]
        num_neurons = next(iter(self.scores.values())).shape[1]
        return moved(shared.tensors, shared.kept, kept.cpu(), num_neurons)


def _shared_kind(kind: str) -> str:
    return "lora" if kind == "full" else kind


def _nearest(known: Iterable[int], kept: int) -> int:
    return min(known, key=lambda number: (abs(number - kept), number))


def prior_of(base: Base, cache_dir: Path) -> Prior | None:
    """The prior learned on this machine, else the shipped one, else None. Raises `MaskFormatError` for a wrong file."""
    shipped = resources.files("masquerade_pruner") / "data" / f"prior-{base.fingerprint[:16]}.safetensors"
    for candidate in (prior_path(base, cache_dir), Path(str(shipped))):
        if candidate.is_file():
            return read_prior(candidate, base)
    return None


def prior_path(base: Base, cache_dir: Path) -> Path:
    """Where a prior that is learned here is kept."""
    return cache_dir / "priors" / f"{base.fingerprint}.safetensors"


def write_prior(path: Path, base: Base, prior: Prior, settings: str) -> None:
    """Write a prior's file by one rename; `settings` is a note for whoever opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    metadata = {"format": FORMAT, "base": base.fingerprint, "settings": settings, "rounds": str(prior.rounds)}
    save_file({name: one.contiguous() for name, one in prior.tensors().items()}, scratch, metadata)
    scratch.replace(path)


def read_prior(path: Path, base: Base) -> Prior:
    """A prior's file. Raises `MaskFormatError`."""
    expected = (base.shape.num_layers, base.shape.intermediate_size)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("base") != base.fingerprint:
            raise MaskFormatError(f"{path.name} is not a prior of this base")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scores = {int(name): one.float() for name, one in tensors.items() if "/" not in name}
    if not scores or any(one.shape != expected or not one.isfinite().all() for one in scores.values()):
        raise MaskFormatError(f"{path.name} does not hold finite scores of shape {list(expected)}")
    recoveries = _recoveries(tensors)
    for (number, kind), shared in recoveries.items():
        if not _usable(shared, number, base.shape):
            raise MaskFormatError(f"{path.name} holds a {kind} recovery that is not of {number} neurons of each layer")
    return Prior(scores, int(metadata.get("rounds", 1)), recoveries)


def _usable(shared: SharedRecovery, number: int, shape: FFNShape) -> bool:
    """Whether the kept neurons are such, and the tensors finite and of as many."""
    kept, layers = shared.kept, shape.num_layers
    sorted_and_known = (
        kept.shape == (layers, number)
        and bool((kept.diff(dim=1) > 0).all())
        and bool((kept >= 0).all())
        and bool((kept < shape.intermediate_size).all())
    )
    return sorted_and_known and all(
        one.ndim == (2 if name in ("gain", "bias") else 3)
        and len(one) == layers
        and bool(one.isfinite().all())
        and counted(name, one) in (None, number)
        for name, one in shared.tensors.items()
    )


def _recoveries(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[int, str], SharedRecovery]:
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        kept, _, rest = path.partition("/")
        kind, _, name = rest.partition("/")
        if name:
            found.setdefault((int(kept), kind), {})[name] = tensor
    nothing = torch.empty(0, 0)
    return {key: SharedRecovery(named.pop(_KEPT, nothing).long(), named) for key, named in found.items()}
