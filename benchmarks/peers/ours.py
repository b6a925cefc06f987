"""Masquerade's engine in process: masks distinct, one for all, or overlapping, and the unpruned base."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from town import overlapping_subnetworks, random_subnetwork
from worker import Result, Run, serve

from masquerade_engine import Base, Engine, EngineSettings, PersonaFunction, Request, SamplingParams, load_base

_CAST = "town"
_IDLE_SHARE = 0.05  # of one core: what a process without background work takes
_IDLE_S = 1.0  # that long
_IDLE_LIMIT_S = 120.0
_PACKED = frozenset({"one", "overlapping"})  # kinds whose masks deserve packs of their own


def functions(base: Base, settings: dict[str, Any]) -> dict[str, list[PersonaFunction]]:
    """What the personas are computed by, for every kind of run."""
    count, sparsity = settings["personas"], settings["sparsity"]
    distinct = [random_subnetwork(base, sparsity, seed) for seed in range(count)]
    overlapping = overlapping_subnetworks(base, sparsity, settings["union_sparsity"], count, seed=0)
    masked = {
        "distinct": distinct,
        "one": distinct[:1] * count,
        "overlapping": overlapping,
    }
    made = {kind: [PersonaFunction(one.digest, _CAST, one) for one in ones] for kind, ones in masked.items()}
    return made | {"base": [PersonaFunction(f"base:{base.fingerprint}", _CAST)] * count}


def open_engine(settings: dict[str, Any]) -> Callable[[Run], Result]:
    """One engine for each kind, opened when it is first asked for: their packs must not compete for one budget."""
    chosen = settings["engine"]
    base = load_base(settings["model"], cache_dir=Path(settings["cache_dir"]), dtype=chosen.get("dtype", "auto"))
    own = EngineSettings(**{name: value for name, value in chosen.items() if name != "dtype"})
    of_kind = functions(base, settings)
    engines: dict[str, Engine] = {}
    numbers = iter(range(1 << 62))

    def run(asked: Run) -> Result:
        if asked.kind not in engines:
            engines[asked.kind] = Engine(base, own)
        engine, own_functions = engines[asked.kind], of_kind[asked.kind]
        result = _run(engine, own_functions, asked, next(numbers))
        _wait_until_idle(engine, own_functions if asked.kind in _PACKED else [])
        return result

    return run


def _run(engine: Engine, functions: list[PersonaFunction], run: Run, number: int) -> Result:
    sampling = SamplingParams(
        max_tokens=run.num_tokens,
        min_tokens=run.num_tokens,
        ignore_eos=True,
        temperature=run.temperature,
        top_p=run.top_p,
    )
    requests = [
        Request(f"{number}/{place}", tuple(prompt), functions[persona], sampling)
        for place, (prompt, persona) in enumerate(zip(run.prompts, run.personas, strict=True))
    ]
    moments: dict[str, list[float]] = defaultdict(list)
    cached: dict[str, int] = {}
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            moments[output.request_id].append(now)
            cached[output.request_id] = output.num_cached_tokens
    packs = Counter(engine.residency(functions[persona].digest) for persona in run.personas)
    said = ", ".join(f"{count} {residency}" for residency, count in packs.most_common())
    return Result.of(run, started, [moments[request.id] for request in requests], sum(cached.values()), said)


def _wait_until_idle(engine: Engine, packed: list[PersonaFunction]) -> None:
    """Until packs that a run has asked for are made: whoever runs next has the machine to itself."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    while time.monotonic() < deadline:
        before = sum(os.times()[:2])
        time.sleep(_IDLE_S)
        is_idle = sum(os.times()[:2]) - before < _IDLE_SHARE * _IDLE_S
        if is_idle and all(engine.residency(one.digest) != "dense" for one in packed):
            return


if __name__ == "__main__":
    serve(open_engine)
