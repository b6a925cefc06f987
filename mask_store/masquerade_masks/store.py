"""The files of personas: every version's mask, report and examples under one data directory."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masquerade_masks import durable, mask_file
from masquerade_masks.durable import write_json_atomic
from masquerade_masks.errors import MaskError, SettingError, VersionNotFound
from masquerade_masks.mask import FFNShape
from masquerade_masks.mask_file import MaskFile
from masquerade_masks.strict_json import dump_bytes

_PERSONA_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

MASK_NAME = "mask.safetensors"
REPORT_NAME = "report.json"
EXAMPLES_NAME = "examples.jsonl"

__all__ = [
    "EXAMPLES_NAME",
    "MASK_NAME",
    "REPORT_NAME",
    "PersonaFiles",
    "check_persona_id",
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

    Ids are checked before any path is made, so nothing a client sends reaches the file system. A version's
    directory appears whole, by one rename, and is flushed to the disk before `publish_version` returns: add
    the registry's row after it.
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
        """Raises `VersionNotFound` and what `mask_file.decode` raises."""
        return mask_file.read(self.mask_path(persona_id, version), base=base, shape=shape)

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
        lease that was just renewed. Raises `StorageFull`, with nothing left behind.
        """
        target = self.directory(persona_id, version)
        files = {MASK_NAME: mask_file.encode(content)}
        if report is not None:
            files[REPORT_NAME] = dump_bytes(report)
        if examples is not None:
            files[EXAMPLES_NAME] = examples.read_bytes() if isinstance(examples, Path) else examples
        if not _holds(target, content.subnetwork.digest):
            with durable.storage_full_as_error(target, sum(map(len, files.values()))):
                self._make_parents(target)
                _write_whole(target, files)
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

    def _existing(self, persona_id: str, version: int, name: str) -> Path:
        path = self.directory(persona_id, version) / name
        if not path.is_file():
            raise VersionNotFound(persona_id, version)
        return path

    def _make_parents(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.flush_directory(self._root)
        durable.flush_directory(self._root.parent)


def _holds(directory: Path, digest: str) -> bool:
    try:
        return mask_file.read(directory / MASK_NAME).subnetwork.digest == digest
    except (OSError, MaskError):
        return False


def _write_whole(target: Path, files: Mapping[str, bytes]) -> None:
    made = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    stale = target.with_name(f".stale-{secrets.token_hex(8)}")
    try:
        made.mkdir()
        for name, data in files.items():
            durable.write_flushed(made / name, data)
        durable.flush_directory(made)
        if target.exists():
            os.replace(target, stale)
        os.replace(made, target)
        durable.flush_directory(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
