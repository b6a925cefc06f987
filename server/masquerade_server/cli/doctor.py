"""`masquerade doctor`: what this machine has, and what to do about each problem."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import typer
from rich.console import Console

from masquerade_engine.threads import available_cores
from masquerade_masks import BaseNotFound, MasqueradeError, UnsupportedModel
from masquerade_masks.registry import SQLiteRegistry
from masquerade_server.cli import options
from masquerade_server.listening import PortInUse, bind, url_of
from masquerade_server.logs import quiet_transformers
from masquerade_server.ready import pruner_data, shipped
from masquerade_server.settings import Settings, unknown_environ

if TYPE_CHECKING:
    from masquerade_engine.base import Base

_FREE_BYTES = 2 * 1024**3  # a dequantised bundled model is 0.5 GB, a sculpt's checkpoints 0.1 GB
_RAM_BYTES = 4 * 1024**3  # the bundled model with a sculpt beside it takes about 3 GB


class Verdict(Enum):
    """How a finding reads."""

    FINE = ("[green]ok[/green]  ", "ok  ")
    NOTE = ("[yellow]note[/yellow]", "note")
    BROKEN = ("[red]FAIL[/red]", "FAIL")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what to do where it is not as it should be."""

    verdict: Verdict
    subject: str
    found: str
    remedy: str = ""


def doctor(
    config: options.Config = None,
    host: options.Host = None,
    port: options.Port = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Look at device, dtype, model, registry and port, and say what to do about each problem.

    Takes the flags of `serve` and judges by them. Exit status 1 where something is broken.
    """
    settings = options.settings_of(
        config,
        host=host,
        port=port,
        data_dir=data_dir,
        cache_dir=cache_dir,
        model=model,
        dtype=dtype,
        device=device,
    )
    console = Console(highlight=False, soft_wrap=True)
    broken = 0
    for finding in examine(settings):
        broken += finding.verdict is Verdict.BROKEN
        console.print(finding.verdict.value[0], f"[bold]{finding.subject}[/bold]:", end=" ")
        console.print(finding.found, markup=False)
        if finding.remedy:
            console.print(f"       {finding.remedy}", markup=False)
    if broken:
        console.print(f"{broken} of these must be put right before `masquerade serve` can run.")
        raise typer.Exit(1)
    console.print("Everything that `masquerade serve` needs is here.")


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding, in the order in which they matter."""
    yield _python()
    yield from _settings()
    yield from _torch(settings)
    yield _memory()
    yield _folder("data directory", settings.data_dir)
    if settings.cache_dir != settings.data_dir / "cache":
        yield _folder("cache directory", settings.cache_dir)
    base = _loaded(settings)
    if isinstance(base, Finding):
        yield base
    else:
        yield _model(base)
        yield _ready_personas(base)
    yield _registry(settings.data_dir)
    yield _port(settings)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding(Verdict.FINE, "python", found)


def _settings() -> Iterator[Finding]:
    for sentence in unknown_environ(os.environ):
        yield Finding(Verdict.NOTE, "settings", sentence, "Rename or unset it; nothing reads it.")


def _torch(settings: Settings) -> Iterator[Finding]:
    try:
        import torch  # noqa: PLC0415
    except ImportError as error:
        yield Finding(Verdict.BROKEN, "torch", str(error), "pip install torch")
        return
    versions = f"{torch.__version__}, transformers {_version('transformers')}, {available_cores()} cores"
    yield Finding(Verdict.FINE, "torch", versions)
    from masquerade_engine.base import resolve_device, resolve_dtype  # noqa: PLC0415

    try:
        device = resolve_device(settings.device)
        dtype = resolve_dtype(settings.dtype, device)
    except MasqueradeError as error:
        yield Finding(Verdict.BROKEN, "device", str(error), "Use --device auto and --dtype auto.")
        return
    found = f"{device}, {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and dtype == torch.float32:
        why = "this CPU has no bf16 instructions, so fp32 is used: it works, at about half the speed"
        yield Finding(Verdict.NOTE, "device", f"{found}; {why}" if settings.dtype == "auto" else found)
    else:
        yield Finding(Verdict.FINE, "device", found)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return Finding(Verdict.FINE, "memory", "not known on this system")
    found = f"{total / 1024**3:.1f} GiB"
    if total < _RAM_BYTES:
        remedy = "Serving fits; for sculpting, 4 GiB are advised, or --workers 0."
        return Finding(Verdict.NOTE, "memory", found, remedy)
    return Finding(Verdict.FINE, "memory", found)


def _folder(subject: str, path: Path) -> Finding:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            free = shutil.disk_usage(path).free
    except OSError as error:
        remedy = f"Make it writable, or choose another with --{subject.replace('directory', 'dir').replace(' ', '-')}."
        return Finding(Verdict.BROKEN, subject, f"{path} cannot be written: {error.strerror}", remedy)
    found = f"{path}, {free / 1024**3:.1f} GiB free"
    if free < _FREE_BYTES:
        return Finding(Verdict.NOTE, subject, found, "Free some space: 2 GiB are advised.")
    return Finding(Verdict.FINE, subject, found)


def _loaded(settings: Settings) -> Base | Finding:
    """The base's description (not its weights), or why there is none."""
    from masquerade_engine.base import load_base  # noqa: PLC0415

    quiet_transformers()

    try:
        return load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device=settings.device)
    except BaseNotFound as error:
        remedy = "Give --model a Hugging Face directory, a .gguf file, a hub id, or smollm2-135m-instruct."
        return Finding(Verdict.BROKEN, "model", str(error), remedy)
    except UnsupportedModel as error:
        return Finding(Verdict.BROKEN, "model", str(error), "Choose another with --model.")
    except (MasqueradeError, ImportError, OSError, ValueError) as error:
        return Finding(Verdict.BROKEN, "model", f"{settings.model} cannot be loaded: {error}")


def _model(base: Base) -> Finding:
    found = f"{base.name}, {base.shape}, {base.context_length} tokens of context, fingerprint {base.fingerprint[:16]}"
    if not base.tokenizer.chat_template:
        remedy = "Personas can be sculpted and chatted with only on a model with a chat template."
        return Finding(Verdict.NOTE, "model", f"{found}; it has no chat template", remedy)
    return Finding(Verdict.FINE, "model", found)


def _ready_personas(base: Base) -> Finding:
    from masquerade_masks.mask_file import read  # noqa: PLC0415

    found = shipped(pruner_data())
    fitting = []
    for one in found:
        try:
            read(one.mask, base=base.fingerprint, shape=base.shape)
        except MasqueradeError:
            continue
        fitting.append(one.id)
    if fitting:
        return Finding(Verdict.FINE, "ready personas", ", ".join(fitting))
    why = "they are for the bundled model" if found else "their masks are not installed"
    return Finding(Verdict.NOTE, "ready personas", f"none: {why}", "Sculpt your own: masquerade personas create")


def _registry(data_dir: Path) -> Finding:
    path = data_dir / "registry.sqlite"
    try:
        with SQLiteRegistry(path) as registry:
            count = len(registry.list_personas(1000))
    except (MasqueradeError, sqlite3.Error, OSError) as error:
        remedy = f"Move {path} aside, or choose another --data-dir."
        return Finding(Verdict.BROKEN, "registry", str(error), remedy)
    return Finding(Verdict.FINE, "registry", f"{path}, {count} personas (SQLite {sqlite3.sqlite_version})")


def _port(settings: Settings) -> Finding:
    subject = "port"
    try:
        with bind(settings.host, settings.port) as bound:
            return Finding(Verdict.FINE, subject, f"{url_of(bound, settings.host)} is free")
    except PortInUse:
        return _who_listens(f"http://{settings.host}:{settings.port}")
    except MasqueradeError as error:
        return Finding(Verdict.BROKEN, subject, str(error), "Choose others with --host and --port.")


def _who_listens(url: str) -> Finding:
    try:
        ready = httpx.get(f"{url}/readyz", timeout=3.0).json()
        if isinstance(ready, dict) and ready.get("status") == "ready":
            return Finding(Verdict.FINE, "port", f"a Masquerade serving {ready.get('model')} answers at {url}")
    except (httpx.HTTPError, ValueError):
        pass
    remedy = "Stop what listens there, or choose another with --port."
    return Finding(Verdict.BROKEN, "port", f"{url} is in use by another program", remedy)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
