"""Base models: one loader for the bundled model, a local directory, a GGUF file and a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from masquerade_engine import gguf_cache
from masquerade_engine.families import family_of, ffn_shape
from masquerade_engine.loading import without_progress_bars
from masquerade_engine.seams import ATTENTION_NAME, install_seams
from masquerade_masks import BaseNotFound, FFNShape, SettingError
from masquerade_masks.fingerprint import fingerprint_directory, fingerprint_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BUNDLED = "smollm2-135m-instruct"
DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:\d+)?")
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Base:
    """A base model's identity and tokenizer; `build_model` gives its weights."""

    name: str  # what a request calls it, as `model`
    path: Path  # a Hugging Face directory; for GGUF the dequantised cache
    source: Path  # what was asked for: the directory itself or the .gguf file
    fingerprint: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    shape: FFNShape
    context_length: int  # tokens
    stop_token_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device

    def build_model(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A fresh model with seams on the base's device, frozen, in eval mode.

        Gradients flow through its activations and linears; the runner packs its own copy.
        """
        from transformers import AutoModelForCausalLM  # noqa: PLC0415  (seconds of import that `doctor` need not pay)

        with without_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype or self.dtype,
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                # Straight to a GPU: 16 GB of weights need not fit into the machine's memory first.
                device_map=None if self.device.type == "cpu" else {"": self.device},
            )
        model.eval().requires_grad_(False)
        seamed: torch.nn.Module = install_seams(model)
        return seamed


def load_base(
    spec: str = BUNDLED,
    *,
    cache_dir: Path,
    dtype: str = "auto",
    device: str = "auto",
    name: str | None = None,
) -> Base:
    """Find, convert where needed, and identify a base model.

    `spec` is the bundled model's name, a directory, a `.gguf` file or a hub id, tried in that order.
    Raises `BaseNotFound`, `UnsupportedModel`, or `SettingError` for a dtype or device that is not to be had.
    """
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415

    source = _locate(spec)
    if source.suffix == ".gguf":
        path = gguf_cache.dequantised(source, cache_dir)
        fingerprint = fingerprint_gguf(source, cache_dir)
    else:
        path = source
        fingerprint = fingerprint_directory(source, cache_dir)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    family_of(config)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    chosen_device = resolve_device(device)
    return Base(
        name=name or _default_name(spec, source),
        path=path,
        source=source,
        fingerprint=fingerprint,
        config=config,
        tokenizer=tokenizer,
        shape=ffn_shape(config),
        context_length=config.max_position_embeddings,
        stop_token_ids=_stop_token_ids(path, config, tokenizer),
        dtype=resolve_dtype(dtype, chosen_device),
        device=chosen_device,
    )


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda:1` is the second GPU. Raises `SettingError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not DEVICE_PATTERN.fullmatch(device):
        raise SettingError("device", f"{device!r} is not one of auto, cpu, cuda, cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError("device", f"{device} was asked for, but torch sees no CUDA device; use auto or cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            "device", f"{device} was asked for, and there are {torch.cuda.device_count()}, from cuda:0 on"
        )
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA and on CPUs with bf16 instructions, else fp32. Raises `SettingError`."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" or cpu_has_bf16() else torch.float32
    if dtype not in DTYPES:
        raise SettingError("dtype", f"{dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX, or Arm's BF16 extension)."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    arm = torch.backends.cpu.get_cpu_capability().startswith("SVE")
    return bool(arm and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _locate(spec: str) -> Path:
    if spec == BUNDLED:
        return gguf_cache.bundled_gguf()
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseNotFound(spec, "there is no such GGUF file")
        return path.resolve()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseNotFound(spec, "the directory holds no config.json")
        return path.resolve()
    return _hub_snapshot(spec)


def _hub_snapshot(spec: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns))
    except HFValidationError as error:
        raise BaseNotFound(spec, f"it is neither {BUNDLED!r}, a directory, a .gguf file nor a hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseNotFound(spec, f"no such file or directory, and the hub gave no snapshot: {error}") from error


def _default_name(spec: str, source: Path) -> str:
    if spec == BUNDLED:
        return BUNDLED
    return (source.stem if source.suffix == ".gguf" else spec.rstrip("/").rsplit("/", 1)[-1]).lower()


def _stop_token_ids(path: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    from transformers import GenerationConfig  # noqa: PLC0415

    found: list[Any] = [config.eos_token_id, tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(path).eos_token_id)
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return frozenset(int(token) for token in flat if token is not None)
