"""What a sculpt would take: the pruner is asked in a process of its own, for the server never imports it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from masquerade_engine.device_memory import host_memory
from masquerade_engine.families import num_parameters
from masquerade_masks import InsufficientMemory
from masquerade_server.jobs import WorkerConfig

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_server.schemas import PersonaBody
    from masquerade_server.settings import Settings

Json = dict[str, Any]

log = logging.getLogger("masquerade.estimate")

_TIMEOUT_S = 60.0  # nearly all of it is the import of torch, on a busy machine
_MAX_KNOWN = 64  # kinds of sculpt: any sparsity is one of its own
_FRESH_S = 60.0  # free memory changes
_TEXT_STEP = 1024  # bytes of text that make another kind: prompts of like length take like memory
_UNKNOWN: Json = {"seconds": None, "memory_bytes": None}
# A bound for `need_not_ask`: what a sculpt of any preset takes is well under it.
_PLENTY_BYTES, _PLENTY_WEIGHTS, _PLENTY_STREAMS, _PLENTY_TOKENS = 4 * 1024**3, 24, 64, 1024


class Estimator:
    """Asks once a minute for each kind of sculpt: of a persona's text the length alone matters."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[tuple[Any, ...], tuple[float, Json]] = {}

    async def estimate(self, body: PersonaBody, *, behind_others: bool = False) -> Json:
        """`seconds`, `memory_bytes` and what else the pruner says; nulls where it cannot say.

        A sculpt that waits `behind_others` is measured against all of the memory there is.
        Raises `InsufficientMemory` for one that does not fit.
        """
        found = await self._kind(body, behind_others)
        if "refused" in found:
            raise InsufficientMemory(**found["refused"])
        return found

    def need_not_ask(self, body: PersonaBody, base: Base) -> bool:
        """Whether a sculpt is another worker's affair, or there is plainly enough memory: asking takes seconds."""
        if self._settings.workers == 0:
            return True
        from masquerade_engine.base import resolve_device  # noqa: PLC0415  (torch, which a base has brought)
        from masquerade_engine.kv_cache import KVGeometry  # noqa: PLC0415

        if resolve_device(self._settings.sculpt_device).type != "cpu":
            return False
        item = base.dtype.itemsize
        tokens = len(body.text.encode()) // 2 + _PLENTY_TOKENS
        keys = _PLENTY_STREAMS * tokens * KVGeometry.of(base.config, base.dtype).bytes_per_token
        passes = tokens * base.shape.num_layers * base.shape.intermediate_size * item * 32
        plenty = _PLENTY_BYTES + _PLENTY_WEIGHTS * num_parameters(base.config) * item + keys + passes
        return host_memory().free >= plenty

    async def _kind(self, body: PersonaBody, behind_others: bool) -> Json:
        length = len(body.text.encode()) // _TEXT_STEP
        key = (body.sparsity, body.preset, body.recovery, body.teacher, length, behind_others)
        asked_at, found = self._known.get(key, (-math.inf, _UNKNOWN))
        if time.monotonic() - asked_at < _FRESH_S:
            return found
        spec = body.model_dump(include={"name", "text", "sparsity", "recovery", "teacher", "preset", "seed"})
        answer = await self._ask(spec | {"behind_others": behind_others})
        if answer is None:
            return _UNKNOWN
        found = answer if "refused" in answer else _UNKNOWN | answer
        self._known.pop(key, None)
        self._known[key] = (time.monotonic(), found)
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return found

    async def _ask(self, spec: Json) -> Json | None:
        config = WorkerConfig.of(self._settings).to_line()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "masquerade_server.estimate"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            said, _ = await asyncio.wait_for(
                process.communicate(config + json.dumps(spec).encode() + b"\n"), _TIMEOUT_S
            )
        except TimeoutError:
            log.warning("the pruner gave no estimate within %.0f s", _TIMEOUT_S)
            return None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            return None
        estimate: Json = json.loads(said)
        return estimate


def main() -> None:
    """Reads a WorkerConfig and a spec, a line each; writes the pruner's estimate, or why it refuses."""
    config = WorkerConfig.from_line(sys.stdin.readline())
    spec = json.loads(sys.stdin.readline())
    behind_others = spec.pop("behind_others")
    from masquerade_server.worker import load_sculpting  # noqa: PLC0415

    tools = load_sculpting(config)
    try:
        found = tools.estimate(tools.spec(persona_id="estimate", **spec), tools.base, behind_others=behind_others)
    except InsufficientMemory as error:
        names = ("device", "needed_bytes", "available_bytes", "advice")
        json.dump({"refused": {name: getattr(error, name) for name in names}}, sys.stdout)
        return
    json.dump(
        {
            "seconds": found["total_seconds"],
            "memory_bytes": found["peak_bytes"],
            "available_bytes": found["available_bytes"],
            "plan": found["plan"],
            "stages": found["seconds"],
            "steps": found["steps"],
            "num_examples": found["num_examples"],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
