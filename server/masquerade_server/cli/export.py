"""`masquerade export`: a persona's sub-network in the forms that other tools read."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from masquerade_masks import MaskFile, NoMaskYet, SettingError
from masquerade_masks.keep_index import export_keep_index
from masquerade_masks.mask_file import read
from masquerade_masks.registry import SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server.cli import options
from masquerade_server.logs import quiet_transformers


class Format(StrEnum):
    """What is written."""

    HF = "hf"
    KEEP_INDEX = "keep-index"
    SAFETENSORS = "safetensors"


Source = Annotated[str, typer.Argument(help="A persona's id in the data directory, or a mask file.")]
Target = Annotated[Path, typer.Argument(help="A new folder (hf) or a file to write.")]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        help="hf: a stock Hugging Face checkpoint with a smaller intermediate_size, for any tool that reads those. "
        "keep-index: kept neurons as [layers, k] integers (.json or .pt). safetensors: the mask file.",
    ),
]
Number = Annotated[int | None, typer.Option("--version", help="The version; by default the one that serves.")]


def export(
    source: Source,
    target: Target,
    format: FormatOption = Format.HF,
    version: Number = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
) -> None:
    """Write a persona's sub-network for other tools.

    \b
    masquerade export pip ./pip-hf                         a checkpoint: AutoModelForCausalLM reads it
    masquerade export pip pip.json --format keep-index     the kept neurons of every layer
    masquerade export masks/witch.safetensors ./witch-hf   from a mask file
    """
    settings = options.settings_of(config, data_dir=data_dir, cache_dir=cache_dir, model=model, dtype=dtype)
    mask_path = _mask_path(source, version, settings.data_dir)
    mask_file = read(mask_path)
    match format:
        case Format.HF:
            _export_checkpoint(mask_file, target, settings.model, settings.cache_dir, settings.dtype)
        case Format.KEEP_INDEX:
            export_keep_index(mask_file.subnetwork, target)
        case Format.SAFETENSORS:
            shutil.copyfile(mask_path, target)
    typer.echo(f"{target}: {mask_file.header.persona}, {mask_file.subnetwork.mask.sparsity:.0%} sparser FFNs")


def _mask_path(source: str, version: int | None, data_dir: Path) -> Path:
    """Raises `PersonaNotFound`, `VersionNotFound`, `NoMaskYet`, `SettingError`."""
    path = Path(source)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise SettingError("source", f"there is no file {source}")
        return path
    with SQLiteRegistry(data_dir / "registry.sqlite") as registry:
        number = registry.get_persona(source).version if version is None else version
        if number is None:
            raise NoMaskYet(source)
        registry.get_version(source, number)
    return PersonaFiles(data_dir).mask_path(source, number)


def _export_checkpoint(mask_file: MaskFile, target: Path, model: str, cache_dir: Path, dtype: str) -> None:
    if target.is_file():
        raise SettingError("target", f"{target} is a file; name a new folder")
    from masquerade_engine.base import load_base  # noqa: PLC0415
    from masquerade_pruner.export import export_checkpoint  # noqa: PLC0415

    quiet_transformers()
    base = load_base(model, cache_dir=cache_dir, dtype=dtype)
    export_checkpoint(base, mask_file.subnetwork, target)
