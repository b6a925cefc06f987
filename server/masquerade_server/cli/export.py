"""`masquerade export`: a persona's sub-network in the forms that other tools read."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from masquerade_masks import MaskFile, NoMaskYet, SettingError, SubNetwork
from masquerade_masks.attached_file import file_name
from masquerade_masks.keep_index import export_keep_index
from masquerade_masks.registry import SQLiteRegistry
from masquerade_masks.store import PersonaFiles, read_with_weights
from masquerade_server.cli import options
from masquerade_server.cli.persona_text import name_of, read_text
from masquerade_server.logs import quiet_transformers

if TYPE_CHECKING:
    from masquerade_server.settings import Settings


class Format(StrEnum):
    """What is written."""

    HF = "hf"
    GGUF = "gguf"
    PEFT = "peft"
    KEEP_INDEX = "keep-index"
    SAFETENSORS = "safetensors"


class Type(StrEnum):
    """How a GGUF file's or a checkpoint's weights are stored."""

    BASE = "base"
    FP32 = "fp32"
    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"


_TYPES = {Format.HF: (Type.BASE, Type.FP32, Type.BF16), Format.GGUF: (Type.BASE, Type.F16, Type.Q8_0)}

Source = Annotated[str, typer.Argument(help="A persona's id in the data directory, or a mask file.")]
Target = Annotated[Path, typer.Argument(help="A new folder (hf, peft) or a file to write.")]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        "-f",
        help="hf: a stock Hugging Face checkpoint with a smaller FFN, for any tool that reads those. gguf: the same "
        "for llama.cpp; the base must be a GGUF file. peft: an adapter of the whole base or, for a persona recovered "
        "with lora, of the checkpoint that is written beside it. keep-index: kept neurons as [layers, k] integers "
        "(.json or .pt). safetensors: the mask file.",
    ),
]
TypeOption = Annotated[
    Type,
    typer.Option(
        "--type",
        "-t",
        help="How weights are stored. base: as the base has them (of a quantised GGUF file, the cut down projection "
        "alone becomes q8_0). hf also: fp32, bf16. gguf also: f16, q8_0.",
    ),
]
Number = Annotated[int | None, typer.Option("--version", help="The version; by default the one that serves.")]
Text = Annotated[str | None, typer.Option("--text", help="Of a mask file: the file with the persona's text.")]
Name = Annotated[
    str | None, typer.Option("--name", help="Of a mask file: the persona's name, as when it was sculpted.")
]


def export(
    source: Source,
    target: Target,
    format: FormatOption = Format.HF,
    type: TypeOption = Type.BASE,
    version: Number = None,
    text: Text = None,
    name: Name = None,
    config: options.Config = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
) -> None:
    """Write a persona for other tools.

    \b
    masquerade export pip ./pip-hf                            a checkpoint: AutoModelForCausalLM reads it
    masquerade export pip pip.gguf --format gguf              a file for llama.cpp, in character at once
    masquerade export pip ./pip-peft --format peft            an adapter for PEFT
    masquerade export pip pip.json --format keep-index        the kept neurons of every layer
    masquerade export witch.safetensors witch.gguf --format gguf --text witch.txt     from a mask file
    """
    if type is not Type.BASE and type not in _TYPES.get(format, ()):
        known = ", ".join(_TYPES.get(format, ())) or "none: it has no choice of types"
        raise SettingError("type", f"{type} is not a type of {format}; there are {known}")
    settings = options.settings_of(config, data_dir=data_dir, cache_dir=cache_dir, model=model, dtype=dtype)
    mask_path, system_prompt = _found(source, version, settings.data_dir, text, name)
    mask_file = read_with_weights(mask_path)
    match format:
        case Format.KEEP_INDEX:
            export_keep_index(mask_file.subnetwork, target)
            _warn_of_what_a_keep_index_lacks(mask_file.subnetwork)
        case Format.SAFETENSORS:
            _copy(mask_path, mask_file.subnetwork, target)
        case _:
            _export_weights(mask_file, target, format, type, system_prompt, settings)
    typer.echo(f"{target}: {mask_file.header.persona}, {mask_file.subnetwork.mask.sparsity:.0%} sparser FFNs")


def _found(
    source: str, version: int | None, data_dir: Path, text: str | None, name: str | None
) -> tuple[Path, str | None]:
    """The mask file and the persona's system prompt.

    Raises `PersonaNotFound`, `VersionNotFound`, `NoMaskYet`, `SettingError`.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise SettingError("source", f"there is no file {source}")
        if text is None and name is not None:
            raise SettingError("name", "goes with --text, the persona's text")
        return path, None if text is None else _system_prompt(text, name)
    if text is not None or name is not None:
        raise SettingError("text" if name is None else "name", f"is for mask files; {source} has its own")
    with SQLiteRegistry(data_dir / "registry.sqlite") as registry:
        number = registry.get_persona(source).version if version is None else version
        if number is None:
            raise NoMaskYet(source)
        system_prompt = registry.get_version(source, number).system_prompt
    return PersonaFiles(data_dir).mask_path(source, number), system_prompt


def _system_prompt(text: str, name: str | None) -> str:
    from masquerade_engine.prompt import persona_system_prompt  # noqa: PLC0415  (torch: seconds of import)

    return persona_system_prompt(name_of(text, name), read_text(text))


def _copy(mask_path: Path, subnetwork: SubNetwork, target: Path) -> None:
    """The mask file, and beside it the weights that it names."""
    for _, digest in subnetwork.attached:
        shutil.copyfile(mask_path.with_name(file_name(digest)), target.with_name(file_name(digest)))
    shutil.copyfile(mask_path, target)


def _warn_of_what_a_keep_index_lacks(subnetwork: SubNetwork) -> None:
    beside = {"gains": subnetwork.gain, "biases": subnetwork.bias, "attached weights": subnetwork.weights}
    if left_out := [name for name, part in beside.items() if part is not None]:
        _warn(f"a keep-index holds the mask alone: this persona's {' and '.join(left_out)} are left out")


def _export_weights(
    mask_file: MaskFile, target: Path, format: Format, type: Type, system_prompt: str | None, settings: Settings
) -> None:
    from masquerade_engine.base import DTYPES, load_base  # noqa: PLC0415
    from masquerade_engine.prompt import prompt_sha256  # noqa: PLC0415
    from masquerade_pruner import export  # noqa: PLC0415

    subnetwork, header = mask_file.subnetwork, mask_file.header
    if system_prompt is None:
        _warn("a mask file does not hold the persona's prompt, so every chat must bring it; --text FILE puts it in")
    elif prompt_sha256(system_prompt) != header.prompt_sha256:
        _warn("the mask was learned under another prompt; --text and --name must be those it was sculpted with")
    quiet_transformers()
    base = load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device="cpu")
    persona = export.ExportedPersona(header.persona, header.version, system_prompt)
    match format:
        case Format.GGUF:
            tensor_type = export.TensorType(type.value)
            in_character = export.export_gguf(base, subnetwork, target, persona, tensor_type=tensor_type)
            _tell_how_to_chat(target, in_character)
        case Format.PEFT:
            export.export_adapter(base, subnetwork, target, persona)
        case _:
            dtype = None if type is Type.BASE else DTYPES[type.value]
            export.export_checkpoint(base, subnetwork, target, persona, dtype=dtype)


def _tell_how_to_chat(target: Path, in_character: bool) -> None:
    typer.echo(f"to chat: llama-cli -m {target} --jinja")
    if not in_character:
        _warn("its chat template does not bring the persona's prompt: pass that as the system prompt (llama-cli -sys)")


def _warn(message: str) -> None:
    typer.echo(f"Note: {message}.", err=True)
