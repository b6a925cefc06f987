"""The files of personas: every version's mask, report and examples under one data directory."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from masquerade_masks import attached_file, durable, mask_file
from masquerade_masks.attached import KINDS, Attached
from masquerade_masks.durable import write_json_atomic
from masquerade_masks.errors import AttachedNotFound, MaskError, MaskFormatError, SettingError, VersionNotFound
from masquerade_masks.mask import FFNShape
from masquerade_masks.mask_file import MaskFile
from masquerade_masks.strict_json import dump_bytes

_PERSONA_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEFT_S = 3600.0  # what is half written or half removed for so long, a process has left behind

MASK_NAME = "mask.safetensors"
REPORT_NAME = "report.json"
EXAMPLES_NAME = "examples.jsonl"

__all__ = [
    "EXAMPLES_NAME",
    "MASK_NAME",
    "REPORT_NAME",
    "PersonaFiles",
    "check_persona_id",
    "read_with_weights",
    "write_json_atomic",
]


def check_persona_id(persona_id: str) -> str:
    """The id itself. Raises `SettingError` unless it is 1 to 63 of a-z, 0-9 and -, not beginning with -."""
    if not _PERSONA_ID.fullmatch(persona_id):
        raise SettingError(
            "id",
            f"{persona_id[:80]!r} is no persona id: 1 to 63 of a-z, 0-9 and -, not beginning with -",
        )
    return persona_id


class PersonaFiles:
    """`personas/<persona_id>/v<version>/{mask.safetensors, report.json, examples.jsonl}` under `data_dir`.

    Attached weights lie beside the mask as `attached-<digest>.safetensors`: a version has its own copy, so that it
    comes and goes with them. Ids are checked before any path is made, so nothing a client sends reaches the file
    system. A version's directory appears whole, by one rename, and is flushed to the disk before `publish_version`
    returns: add the registry's row after it.
    """

    def __init__(self, data_dir: Path) -> None:
        self._root = data_dir / "personas"

    def directory(self, persona_id: str, version: int) -> Path:
        """Where a version's files are or will be. Raises `SettingError` for an id that is none."""
        if version < 1:
            raise VersionNotFound(persona_id, version)
        return self._root / check_persona_id(persona_id) / f"v{version:d}"

    def mask_path(self, persona_id: str, version: int) -> Path:
        """The mask file. Raises `VersionNotFound`."""
        return self._existing(persona_id, version, MASK_NAME)

    def examples_path(self, persona_id: str, version: int) -> Path:
        """The synthesised questions and answers. Raises `VersionNotFound` where there are none."""
        return self._existing(persona_id, version, EXAMPLES_NAME)

    def read_mask(
        self, persona_id: str, version: int, *, base: str | None = None, shape: FFNShape | None = None
    ) -> MaskFile:
        """The mask, and its attached weights where it names any.

        Raises `VersionNotFound`, what `mask_file.decode` and `attached_file.decode` raise, and `AttachedNotFound`.
        """
        return read_with_weights(self.mask_path(persona_id, version), base=base, shape=shape)

    def attached_path(self, persona_id: str, version: int, digest: str) -> Path:
        """The file of a version's attached weights. Raises `VersionNotFound`."""
        assert _SHA256.fullmatch(digest), "digests are checked where they enter"
        return self._existing(persona_id, version, attached_file.file_name(digest))

    def find_attached(self, kind: str, digest: str) -> Attached:
        """The attached weights of any version here.

        Raises `AttachedNotFound`, and what `attached_file.decode` raises.
        """
        if kind in KINDS and _SHA256.fullmatch(digest):
            for path in self._root.glob(f"*/v*/{attached_file.file_name(digest)}"):
                return attached_file.read(path)
        raise AttachedNotFound(kind, digest)

    def read_report(self, persona_id: str, version: int) -> dict[str, Any] | None:
        """The fidelity report, None where the version has none. Raises `VersionNotFound`."""
        path = self.mask_path(persona_id, version).with_name(REPORT_NAME)
        if not path.is_file():
            return None
        report: dict[str, Any] = json.loads(path.read_bytes())
        return report

    def publish_version(
        self,
        persona_id: str,
        version: int,
        content: MaskFile,
        *,
        report: Mapping[str, Any] | None = None,
        examples: Path | bytes | None = None,
    ) -> Path:
        """Write a version's files; its directory.

        A directory that is already there was left by a worker that died, or lost its lease, before the
        registry had its row. With the same digest it stays, otherwise it is replaced; so publish only under a
        lease that was just renewed. Raises `StorageFull`, with nothing left behind, and `AttachedNotFound` for a mask
        whose attached weights are not loaded.
        """
        target = self.directory(persona_id, version)
        subnetwork = content.subnetwork
        files: dict[str, bytes] = {MASK_NAME: mask_file.encode(content)}
        num_bytes = 0
        if subnetwork.weights is not None:
            num_bytes = subnetwork.weights.num_bytes
        elif subnetwork.attached:
            raise AttachedNotFound(*subnetwork.attached[0])
        if report is not None:
            files[REPORT_NAME] = dump_bytes(report)
        if examples is not None:
            files[EXAMPLES_NAME] = examples.read_bytes() if isinstance(examples, Path) else examples
        if not _holds(target, subnetwork.digest):
            with durable.storage_full_as_error(target, num_bytes + sum(map(len, files.values()))):
                self._make_parents(target)
                _write_whole(target, files, subnetwork.weights)
        return target

    def remove(self, persona_id: str) -> None:
        """Delete all files of a persona, if there are any; whoever has one open reads on."""
        directory = self._root / check_persona_id(persona_id)
        if not directory.is_dir():
            return
        doomed = self._root / f".removed-{secrets.token_hex(8)}"
        os.replace(directory, doomed)
        durable.flush_directory(self._root)
        shutil.rmtree(doomed, ignore_errors=True)

    def tidy(self) -> None:
        """Delete what processes that died have left half written or half removed."""
        oldest = time.time() - _LEFT_S
        for pattern in (".removed-*", "*/.stale-*", "*/.v*-*"):
            for left in self._root.glob(pattern):
                try:
                    abandoned = left.stat().st_mtime < oldest
                except FileNotFoundError:  # its owner lives, and was faster
                    continue
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)

    def _existing(self, persona_id: str, version: int, name: str) -> Path:
        path = self.directory(persona_id, version) / name
        if not path.is_file():
            raise VersionNotFound(persona_id, version)
        return path

    def _make_parents(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.flush_directory(self._root)
        durable.flush_directory(self._root.parent)


def read_with_weights(path: Path, *, base: str | None = None, shape: FFNShape | None = None) -> MaskFile:
    """A mask file with the attached weights that it names, from beside it. Raises what `PersonaFiles.read_mask` does."""
    content = mask_file.read(path, base=base, shape=shape)
    attached = content.subnetwork.attached
    if not attached:
        return content
    if len(attached) > 1 or attached[0][0] not in KINDS:
        names = ", ".join(name for name, _ in attached)
        raise MaskFormatError(f"a mask has {' or '.join(KINDS)} weights attached, one of them; this names {names}")
    kind, digest = attached[0]
    try:
        weights = attached_file.read(path.with_name(attached_file.file_name(digest)))
    except FileNotFoundError as error:
        raise AttachedNotFound(kind, digest) from error
    return replace(content, subnetwork=replace(content.subnetwork, weights=weights))


def _holds(directory: Path, digest: str) -> bool:
    try:
        return read_with_weights(directory / MASK_NAME).subnetwork.digest == digest
    except (OSError, MaskError):
        return False


def _write_whole(target: Path, files: Mapping[str, bytes], weights: Attached | None) -> None:
    """Attached weights first: a mask is never without those it names."""
    made = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    stale = target.with_name(f".stale-{secrets.token_hex(8)}")
    contents: dict[str, Iterable[bytes | memoryview]] = {name: [data] for name, data in files.items()}
    if weights is not None:
        contents = {attached_file.file_name(weights.digest): attached_file.encode(weights), **contents}
    try:
        made.mkdir()
        for name, chunks in contents.items():
            durable.write_flushed(made / name, chunks)
        durable.flush_directory(made)
        if target.exists():
            os.replace(target, stale)
        os.replace(made, target)
        durable.flush_directory(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
