"""PEFT's LoRA directories, `adapter_config.json` beside `adapter_model.safetensors`, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masquerade_masks.attached import PARTS, Attached
from masquerade_masks.attached_file import MAX_BYTES
from masquerade_masks.container import ATTACHED, chunks, unpack
from masquerade_masks.durable import write_atomic, write_json_atomic
from masquerade_masks.errors import MaskFormatError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# What would make of the same tensors another function, and the value under which it does not.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


def read_peft(directory: Path) -> Attached:
    """The low-rank updates of a PEFT directory; `Attached.check_fits` tells whether they belong to a base.

    Raises `MaskFormatError` (not such a directory, damaged, of another kind than plain LoRA), `MaskShapeError`,
    `NonFiniteMask`; `OSError` for files that cannot be read.
    """
    config, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    for path in (config, weights):
        if not path.is_file():
            raise MaskFormatError(
                f"a PEFT adapter is a directory with {CONFIG_NAME} and {WEIGHTS_NAME}: no {path.name}"
            )
    rank, alpha = _numbers(config.read_bytes())
    if weights.stat().st_size > MAX_BYTES:
        raise MaskFormatError(f"attached weights may take {MAX_BYTES} bytes; {WEIGHTS_NAME} has more")
    tensors, _ = unpack(weights.read_bytes(), ATTACHED)
    return Attached("lora", tensors, alpha, rank)


def write_peft(attached: Attached, directory: Path, *, base_model: str) -> None:
    """Write low-rank updates as PEFT loads them; `base_model` is the base's path or hub id, for the config.

    Raises `MaskFormatError` for other weights than lora, and `StorageFull`.
    """
    if attached.kind != "lora":
        raise MaskFormatError(f"a PEFT adapter holds low-rank updates, and these weights are {attached.kind}")
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / WEIGHTS_NAME
    write_atomic(weights, chunks(attached.tensors, {"format": "pt"}, ATTACHED), attached.num_bytes)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": attached.rank,
        "lora_alpha": attached.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(PARTS),
        "bias": "none",
        "inference_mode": True,
    }
    write_json_atomic(directory / CONFIG_NAME, config)


def _numbers(data: bytes) -> tuple[int, float]:
    """Rank and alpha."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MaskFormatError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise MaskFormatError(f"{CONFIG_NAME} is not of a LoRA adapter")
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise MaskFormatError(f"{CONFIG_NAME} has {name} {config[name]!r}; only plain LoRA can be attached")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise MaskFormatError(f"{CONFIG_NAME} has r {rank!r} and lora_alpha {alpha!r}, which are not two numbers")
    return rank, float(alpha)
