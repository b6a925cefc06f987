"""What a sculpt would take: the pruner is asked in a process of its own, for the server never imports it."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from masquerade_server.jobs import WorkerConfig

if TYPE_CHECKING:
    from masquerade_server.schemas import PersonaBody
    from masquerade_server.settings import Settings

Json = dict[str, Any]

log = logging.getLogger("masquerade.estimate")

_TIMEOUT_S = 60.0  # nearly all of it is the import of torch, on a busy machine
_MAX_KNOWN = 64  # kinds of sculpt: any sparsity is one of its own
_UNKNOWN: Json = {"seconds": None, "memory_bytes": None}


class Estimator:
    """Asks once for each kind of sculpt: the persona's text hardly matters."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[tuple[float, str, str, str], Json] = {}

    async def estimate(self, body: PersonaBody) -> Json:
        """`seconds`, `memory_bytes` and what else the pruner says; nulls where it cannot say."""
        key = (body.sparsity, body.preset, body.recovery, body.teacher)
        if key not in self._known:
            spec = body.model_dump(include={"name", "text", "sparsity", "recovery", "teacher", "preset", "seed"})
            found = await self._ask(spec)
            if found is None:
                return _UNKNOWN
            self._known[key] = _UNKNOWN | found
            if len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return self._known[key]

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
    """Reads a WorkerConfig and a spec, a line each; writes the pruner's estimate."""
    config = WorkerConfig.from_line(sys.stdin.readline())
    spec = json.loads(sys.stdin.readline())
    from masquerade_server.worker import load_sculpting  # noqa: PLC0415

    tools = load_sculpting(config)
    found = tools.estimate(tools.spec(persona_id="estimate", **spec), tools.base)
    json.dump(
        {
            "seconds": found["total_seconds"],
            "memory_bytes": found["peak_bytes"],
            "stages": found["seconds"],
            "steps": found["steps"],
            "num_examples": found["num_examples"],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
