"""`masquerade serve`."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from masquerade_server.cli import options
from masquerade_server.listening import bind, url_of
from masquerade_server.logs import logging_setup
from masquerade_server.settings import unknown_environ

if TYPE_CHECKING:
    from fastapi import FastAPI

MaxSeqs = Annotated[int | None, typer.Option(help="Chats computed at once (32). [MASQUERADE_MAX_NUM_SEQS]")]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together (the base's own). [MASQUERADE_MAX_MODEL_LEN]"),
]
MaxQueue = Annotated[int | None, typer.Option(help="Chats that may wait (256). [MASQUERADE_MAX_QUEUE]")]
Quantization = Annotated[
    str | None,
    typer.Option(help="Of the weights: none, or int8 at half the memory (none). [MASQUERADE_QUANTIZATION]"),
]
EnforceEager = Annotated[bool | None, typer.Option(help="Decode without CUDA graphs (no). [MASQUERADE_ENFORCE_EAGER]")]
KVCache = Annotated[
    int | None, typer.Option(help="MiB for the running chats' keys and values (8192). [MASQUERADE_KV_CACHE_MB]")
]
PrefixCache = Annotated[
    int | None, typer.Option(help="MiB for prompts that may come again (512). [MASQUERADE_PREFIX_CACHE_MB]")
]
PackCache = Annotated[
    int | None, typer.Option(help="MiB for weights of busy personas and casts (512). [MASQUERADE_PACK_CACHE_MB]")
]
LoadTimeout = Annotated[
    int | None,
    typer.Option(help="Seconds a chat waits for its persona's own weights (30). [MASQUERADE_LOAD_TIMEOUT_S]"),
]
Key = Annotated[str | None, typer.Option(help="Ask every client for this bearer key. [MASQUERADE_API_KEY]")]
Workers = Annotated[int | None, typer.Option(help="Sculpt workers beside the server, 0 or 1 (1). [MASQUERADE_WORKERS]")]
SculptDevice = Annotated[
    str | None, typer.Option(help="Where the worker sculpts, by default --device. [MASQUERADE_SCULPT_DEVICE]")
]
SculptCheckpointing = Annotated[
    str | None,
    typer.Option(help="auto, on or off: see `masquerade sculpt --help`. [MASQUERADE_SCULPT_CHECKPOINTING]"),
]
SculptMicroBatch = Annotated[
    int | None,
    typer.Option(help="Branches of a learning step at once; 0: as many as fit. [MASQUERADE_SCULPT_MICRO_BATCH]"),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine (every core). [MASQUERADE_THREADS]")]


def serve(
    config: options.Config = None,
    host: options.Host = None,
    port: options.Port = None,
    data_dir: options.DataDir = None,
    cache_dir: options.CacheDir = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantization: Quantization = None,
    enforce_eager: EnforceEager = None,
    max_num_seqs: MaxSeqs = None,
    max_model_len: MaxLen = None,
    max_queue: MaxQueue = None,
    kv_cache_mb: KVCache = None,
    prefix_cache_mb: PrefixCache = None,
    pack_cache_mb: PackCache = None,
    load_timeout_s: LoadTimeout = None,
    api_key: Key = None,
    workers: Workers = None,
    sculpt_device: SculptDevice = None,
    sculpt_checkpointing: SculptCheckpointing = None,
    sculpt_micro_batch: SculptMicroBatch = None,
    threads: Threads = None,
    log_level: options.LogLevel = None,
    teacher_url: options.TeacherUrl = None,
    teacher_model: options.TeacherModel = None,
    teacher_api_key: options.TeacherKey = None,
    teacher_concurrency: options.TeacherConcurrency = None,
    teacher_timeout_s: options.TeacherTimeout = None,
) -> None:
    """Start the server.

    \b
    masquerade serve                                   the bundled model
    masquerade serve --model ~/models/Llama-3.2-1B-Instruct
    masquerade serve --host 0.0.0.0 --api-key secret   open, with a key

    It listens on http://127.0.0.1:8000 and answers OpenAI's calls (/v1/chat/completions) with a persona's id as
    the model. Stop it with Ctrl-C.
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
        quantization=quantization,
        enforce_eager=enforce_eager,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_queue=max_queue,
        kv_cache_mb=kv_cache_mb,
        prefix_cache_mb=prefix_cache_mb,
        pack_cache_mb=pack_cache_mb,
        load_timeout_s=load_timeout_s,
        api_key=api_key,
        workers=workers,
        sculpt_device=sculpt_device,
        sculpt_checkpointing=sculpt_checkpointing,
        sculpt_micro_batch=sculpt_micro_batch,
        threads=threads,
        log_level=log_level,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        teacher_api_key=teacher_api_key,
        teacher_concurrency=teacher_concurrency,
        teacher_timeout_s=teacher_timeout_s,
    )
    bound = bind(settings.host, settings.port)
    url = url_of(bound, settings.host)
    logging_setup(settings.log_level)
    for stray in unknown_environ(os.environ):
        logging.getLogger("masquerade").warning("%s", stray)
    typer.echo(f"Loading {settings.model}; the first start of a model takes longest.", err=True)
    from masquerade_server.serve import serve as run  # noqa: PLC0415

    with suppress(KeyboardInterrupt):  # raised anew once the server has ended
        run(settings, bound, on_ready=lambda app: typer.echo(_ready_text(app, url, settings.api_key)))


def _ready_text(app: FastAPI, url: str, api_key: str | None) -> str:
    state = app.state.server
    base = state.backend.base
    personas = state.registry.list_personas(50)
    names = ", ".join(persona.id for persona in personas[:6]) + (", ..." if len(personas) > 6 else "")
    body = {
        "model": personas[0].id if personas else base.name,
        "messages": [{"role": "user", "content": "What should I know about you?"}],
    }
    return "\n".join(
        [
            f"Masquerade serves {base.name} at {url}" + (f" as {names}" if personas else ""),
            "",
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            *(['    -H "Authorization: Bearer $MASQUERADE_API_KEY" \\'] if api_key else []),
            f"    -d '{json.dumps(body)}'",
            "",
        ]
    )
