"""How many threads a process may use: plain data, no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping


def available_cores() -> int:
    """The cores that this process may run on.

    Not torch's own default: that obeys `OMP_NUM_THREADS`, which container images like to set to 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def yield_at_barriers() -> None:
    """Have OpenMP threads spin for a moment and then sleep while they wait for each other; before torch is imported.

    Where another process wants the same cores (a sculpt beside the chats), a spinning thread keeps the core that the
    one it waits for needs: 32 streams beside such load ran 255 tokens/s asleep and 165 spinning. A thread that sleeps
    at once takes 70 us to wake, a hundred times a step: the linears of 16 rows took 20 ms so, and 14 ms with a moment's
    spinning (about 100 us). A user's own settings stay.
    """
    os.environ.update(barrier_settings(os.environ))


def barrier_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What `yield_at_barriers` adds to an environment, for a process that is about to start."""
    return {} if "OMP_WAIT_POLICY" in environ else {"GOMP_SPINCOUNT": "5000", "OMP_WAIT_POLICY": "PASSIVE"}
