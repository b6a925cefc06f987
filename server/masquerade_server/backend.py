"""Loading: from settings to a base, an engine on it, and a catalogue that resolves names."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import TYPE_CHECKING, cast

from masquerade_engine.threads import available_cores
from masquerade_server.catalogue import Catalogue
from masquerade_server.logs import quiet_transformers
from masquerade_server.personas import PersonaDesk
from masquerade_server.ready import import_ready, pruner_data
from masquerade_server.state import Backend, ChatEngine, EngineFactory, ServerState

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_masks.registry import Event, Persona
    from masquerade_server.settings import Settings

log = logging.getLogger("masquerade.backend")

WARM_AT_START = 16  # personas whose weights, and then prompts, are prepared before anyone asks


@asynccontextmanager
async def open_engine(base: Base, settings: Settings) -> AsyncIterator[ChatEngine]:
    """The real engine."""
    from masquerade_engine import AsyncEngine, EngineSettings  # noqa: PLC0415  (torch: seconds of import)
    from masquerade_engine.settings import MIB, Quantization  # noqa: PLC0415

    wanted = EngineSettings(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_queue=settings.max_queue,
        kv_cache_bytes=settings.kv_cache_mb * MIB,
        prefix_cache_bytes=settings.prefix_cache_mb * MIB,
        pack_cache_bytes=settings.pack_cache_mb * MIB,
        load_timeout_s=settings.load_timeout_s,
        quantization=cast(Quantization, settings.quantization),
        enforce_eager=settings.enforce_eager,
    )
    async with AsyncEngine(base, wanted, num_threads=settings.threads or available_cores()) as engine:
        yield cast(ChatEngine, engine)


@asynccontextmanager
async def open_backend(state: ServerState, engine_factory: EngineFactory) -> AsyncIterator[Backend]:
    """Load the base, start its engine, bring in the ready personas.

    Raises `BaseNotFound`, `UnsupportedModel`, `SettingError`.
    """
    settings, started = state.settings, time.monotonic()
    base = await asyncio.to_thread(_load_base, settings)
    log.info("base %s (%s) on %s, %s", base.name, base.fingerprint[:16], base.device, base.dtype)
    async with engine_factory(base, settings) as engine:
        catalogue = Catalogue(base, state.registry, state.files)
        backend = Backend(base, engine, catalogue, int(time.time()))
        await asyncio.to_thread(import_ready, base, state.registry, state.files, settings.data_dir, pruner_data())
        for persona in await asyncio.to_thread(_install_some, backend, state):
            state.warmer.order(persona.id)  # their prompts: once chats are answered
        log.info("ready after %.1f s", time.monotonic() - started)
        yield backend


def replace_served(backend: Backend, state: ServerState, event: Event) -> None:
    """Install the version that an event says is served from now on, in place of the others; called in a thread."""
    persona = state.registry.get_persona(event.persona_id)
    serving = backend.catalogue.serving(persona).function
    for version in state.registry.list_versions(persona.id):
        if version.digest != serving.digest:
            backend.engine.forget(version.digest)  # first: its memory is what the new pack may need
    backend.engine.install(serving)


def _load_base(settings: Settings) -> Base:
    import torch  # noqa: PLC0415

    from masquerade_engine.base import load_base  # noqa: PLC0415

    quiet_transformers()
    torch.set_num_threads(1)  # the engine's thread alone has a pool: see `AsyncEngine`
    return load_base(settings.model, cache_dir=settings.cache_dir, dtype=settings.dtype, device=settings.device)


def _install_some(backend: Backend, state: ServerState) -> list[Persona]:
    """Have the weights of the first `WARM_AT_START` personas prepared; which they are."""
    desk = PersonaDesk(backend, state.registry, state.files)
    personas = list(islice((one for one in desk.every() if one.version is not None), WARM_AT_START))
    for persona in personas:
        backend.engine.install(backend.catalogue.serving(persona).function)
    return personas
