"""Options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from masquerade_server.settings import Settings, resolve_settings

Config = Annotated[Path | None, typer.Option("--config", help="A TOML file of settings. [MASQUERADE_CONFIG]")]
Host = Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1). [MASQUERADE_HOST]")]
Port = Annotated[int | None, typer.Option(help="Port to listen on (8000). [MASQUERADE_PORT]")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Where personas, masks and the registry are kept. [MASQUERADE_DATA_DIR]"),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="What can be made again: dequantised models (data dir/cache). [MASQUERADE_CACHE_DIR]"),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base: the bundled smollm2-135m-instruct, a Hugging Face directory, a .gguf file or a hub id. "
        "[MASQUERADE_MODEL]"
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="auto, bf16 or fp32; auto is bf16 where the machine has it. [MASQUERADE_DTYPE]")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [MASQUERADE_DEVICE]")]
SculptDevice = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N. [MASQUERADE_SCULPT_DEVICE]")
]
Checkpointing = Annotated[
    str | None,
    typer.Option(
        "--checkpointing",
        help="auto, on or off: on computes forward passes again in place of keeping them. "
        "[MASQUERADE_SCULPT_CHECKPOINTING]",
    ),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch",
        help="Branches of a learning step at once; 0: as many as fit. [MASQUERADE_SCULPT_MICRO_BATCH]",
    ),
]
LogLevel = Annotated[str | None, typer.Option(help="debug, info, warning or error. [MASQUERADE_LOG_LEVEL]")]
TeacherUrl = Annotated[
    str | None,
    typer.Option(
        help="Base URL of a remote teacher, an OpenAI-compatible chat API: https://host/v1. [MASQUERADE_TEACHER_URL]"
    ),
]
TeacherModel = Annotated[str | None, typer.Option(help="The teacher's model. [MASQUERADE_TEACHER_MODEL]")]
TeacherKey = Annotated[
    str | None,
    typer.Option(
        "--teacher-api-key", help="The teacher's key; the variable hides it better. [MASQUERADE_TEACHER_API_KEY]"
    ),
]
TeacherConcurrency = Annotated[
    int | None, typer.Option(help="Requests to the teacher at once (8). [MASQUERADE_TEACHER_CONCURRENCY]")
]
TeacherTimeout = Annotated[
    int | None,
    typer.Option("--teacher-timeout-s", help="Seconds for one of its answers (120). [MASQUERADE_TEACHER_TIMEOUT_S]"),
]

Url = Annotated[str | None, typer.Option("--url", help="The server (http://127.0.0.1:8000). [MASQUERADE_URL]")]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="The server's key. [MASQUERADE_API_KEY]")]


def settings_of(config: Path | None, **flags: Any) -> Settings:
    """The settings of a command from its flags. Raises `SettingError`."""
    return resolve_settings(flags, config=config)
