"""Files of attached weights: one safetensors file beside a mask's, named by its digest.

Metadata: `format`, `kind`, `digest`, and of lora `rank` and `alpha`. Such a file is written once and never changed, so
it is mapped rather than read: a persona's weights take no memory until a device asks for them.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from masquerade_masks.attached import FORMAT, KINDS, Attached, Kind
from masquerade_masks.container import ATTACHED, chunks, unpack
from masquerade_masks.durable import write_atomic
from masquerade_masks.errors import DigestMismatch, MaskFormatError

MAX_BYTES = 16 << 30  # the own weights of an 8B base at 25 % are 8.5 GB in bf16

_NUMBERS = frozenset({"rank", "alpha"})
_COMMON = frozenset({"format", "kind", "digest"})
_RANK = re.compile(r"[1-9][0-9]{0,5}")
_ALPHA = re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def file_name(digest: str) -> str:
    """What the file is called in a version's directory."""
    return f"attached-{digest}.safetensors"


def encode(attached: Attached) -> Iterator[bytes | memoryview]:
    """The file's bytes, the same for the same content on every machine, in pieces that copy no tensor."""
    metadata = {"format": FORMAT, "kind": attached.kind, "digest": attached.digest}
    if attached.kind == "lora":
        metadata |= {"rank": str(attached.rank), "alpha": repr(attached.alpha)}
    return chunks(attached.tensors, metadata, ATTACHED)


def decode(data: bytes | memoryview) -> Attached:
    """Read and check a file of attached weights; its tensors are views of `data`.

    Raises `MaskFormatError` (not safetensors, truncated, over `MAX_BYTES`, unknown version, damaged metadata),
    `MaskShapeError`, `NonFiniteMask` and `DigestMismatch`.
    """
    _check_size(len(data))
    tensors, metadata = unpack(data, ATTACHED)
    kind = _kind(metadata)
    rank, alpha = (int(metadata["rank"]), float(metadata["alpha"])) if kind == "lora" else (None, None)
    attached = Attached(kind, tensors, alpha, rank)
    if attached.digest != metadata["digest"]:
        raise DigestMismatch(metadata["digest"], attached.digest, ATTACHED.name)
    return attached


def read(path: Path) -> Attached:
    """`decode` of a file, mapped. Raises what it raises, and `OSError` where the file cannot be read."""
    with path.open("rb") as file:
        num_bytes = path.stat().st_size
        _check_size(num_bytes)
        if num_bytes == 0:
            raise MaskFormatError(f"not a {ATTACHED.name}: it is empty")
        return decode(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def write(path: Path, attached: Attached) -> None:
    """`encode` into a file that is whole or absent, flushed to the disk on return. Raises `StorageFull`."""
    write_atomic(path, encode(attached), attached.num_bytes)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise MaskFormatError(f"attached weights may take {MAX_BYTES} bytes; these are {num_bytes}")


def _kind(metadata: Mapping[str, str]) -> Kind:
    if metadata.get("format") != FORMAT:
        raise MaskFormatError(f"attached weights are of the format {FORMAT!r}; these say {metadata.get('format')!r}")
    kind = next((known for known in KINDS if known == metadata.get("kind")), None)
    if kind is None:
        raise MaskFormatError(f"attached weights are {' or '.join(KINDS)}, not {metadata.get('kind')!r}")
    expected = _COMMON | _NUMBERS if kind == "lora" else _COMMON
    if metadata.keys() != expected:
        raise MaskFormatError(f"the metadata of {kind} weights are {', '.join(sorted(expected))}, each once")
    if kind == "lora" and not (_RANK.fullmatch(metadata["rank"]) and _ALPHA.fullmatch(metadata["alpha"])):
        raise MaskFormatError(
            f"rank {metadata['rank'][:40]!r} and alpha {metadata['alpha'][:40]!r} are not two numbers"
        )
    return kind
