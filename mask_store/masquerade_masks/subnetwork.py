"""Sub-networks: all that changes a persona's function, and the digest that names it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from masquerade_masks.attached import Attached
from masquerade_masks.digests import digest_of_parts
from masquerade_masks.errors import MaskFormatError, MaskShapeError, NonFiniteMask
from masquerade_masks.mask import Bits, FFNShape, Mask

FORMAT = "masquerade.mask/1"

HalfArray = npt.NDArray[np.float16]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SubNetwork:
    """A mask on one base with its optional gains and biases; equal where the digests are.

    `gain` is float16 `[num_layers, kept]` in the order of the kept indices, `bias` float16 `[num_layers,
    hidden]`, both finite and read-only; `attached` names the digests of further weights (`lora`, `full`), and `weights`
    are these weights where they have been loaded: given alone, they are attached by it.

    Raises `MaskShapeError`, `NonFiniteMask`, and `MaskFormatError` for a name attached twice, or weights that are not
    those attached or do not fit.
    """

    base: str  # fingerprint
    shape: FFNShape
    mask: Mask
    gain: HalfArray | None = None
    bias: HalfArray | None = None
    attached: tuple[tuple[str, str], ...] = ()
    weights: Attached | None = None
    digest: str = field(init=False)  # sha256, lower-case hex

    def __post_init__(self) -> None:
        _check_mask_fits(self.mask, self.shape)
        for name, columns in (("gain", self.mask.kept), ("bias", self.shape.hidden_size)):
            array = getattr(self, name)
            if array is not None:
                check_half(name, array, (self.shape.num_layers, columns))
                object.__setattr__(self, name, _read_only(array))
        object.__setattr__(self, "attached", _sorted_once(_with_weights(self.attached, self.weights)))
        if self.weights is not None:
            self.weights.check_fits(self.shape, self.mask.kept)
        digest = digest_of(
            self.base,
            self.shape,
            bits=self.mask.bits,
            gain=self.gain,
            bias=self.bias,
            attached=self.attached,
        )
        object.__setattr__(self, "digest", digest)

    @property
    def has_own_ffn(self) -> bool:
        """Whether its FFN weights are its own (`full`), so that the base's cannot stand in for them."""
        return any(name == "full" for name, _ in self.attached)

    def coefficients(self) -> FloatArray:
        """Float32 `[num_layers, intermediate]`: 0 where dropped, else the gain, 1 without gains."""
        coefficients = self.mask.to_dense().astype(np.float32)
        if self.gain is not None:
            np.put_along_axis(coefficients, self.mask.kept_indices(), self.gain.astype(np.float32), axis=1)
        return coefficients

    def biases(self) -> FloatArray | None:
        """Float32 `[num_layers, hidden]`, None where there are none."""
        return None if self.bias is None else self.bias.astype(np.float32)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SubNetwork) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)


def digest_of(
    base: str,
    shape: FFNShape,
    *,
    bits: Bits,
    gain: HalfArray | None,
    bias: HalfArray | None,
    attached: tuple[tuple[str, str], ...],
) -> str:
    """Sha256 over everything that changes the function, in this order, absent parts left out.

    Every part is its name and its content, each after its length in bytes as a little-endian u64: `format`,
    `base`, `shape` (three little-endian u64), `mask`, `gain`, `bias` (raw C-order little-endian values), then
    `attached:<name>` and the digest of every attached weight, by name.
    """
    sizes = np.array([shape.num_layers, shape.intermediate_size, shape.hidden_size], dtype="<u8")
    parts: list[tuple[str, bytes]] = [
        ("format", FORMAT.encode()),
        ("base", base.encode()),
        ("shape", sizes.tobytes()),
        ("mask", bits.tobytes()),
    ]
    parts += [
        (name, array.astype("<f2").tobytes()) for name, array in (("gain", gain), ("bias", bias)) if array is not None
    ]
    parts += [(f"attached:{name}", digest.encode()) for name, digest in attached]
    return digest_of_parts(parts)


def check_half(name: str, array: HalfArray, expected: tuple[int, int]) -> None:
    """Raise `MaskShapeError` unless it is float16 of that shape, `NonFiniteMask` unless it is finite."""
    if array.dtype != np.float16 or array.shape != expected:
        raise MaskShapeError(f"{name} is float16 {list(expected)}; this is {array.dtype} {list(array.shape)}")
    layers = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if layers.size:
        raise NonFiniteMask(name, int(layers[0]))


def _check_mask_fits(mask: Mask, shape: FFNShape) -> None:
    if (mask.num_layers, mask.intermediate_size) != (shape.num_layers, shape.intermediate_size):
        raise MaskShapeError(
            f"the mask has {mask.num_layers} layers x {mask.intermediate_size} neurons, and the base {shape}"
        )


def _with_weights(attached: tuple[tuple[str, str], ...], weights: Attached | None) -> tuple[tuple[str, str], ...]:
    if weights is None:
        return attached
    if attached and attached != ((weights.kind, weights.digest),):
        raise MaskFormatError(f"{weights.kind} weights of digest {weights.digest} are not those that the mask names")
    return ((weights.kind, weights.digest),)


def _sorted_once(attached: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    names = [name for name, _ in attached]
    if len(set(names)) != len(names):
        raise MaskFormatError(f"a name is attached twice: {', '.join(sorted(names))}")
    return tuple(sorted((name, digest) for name, digest in attached))


def _read_only(array: HalfArray) -> HalfArray:
    own = np.array(array, order="C", copy=True)
    own.flags.writeable = False
    return own
