"""How many threads a process may use: plain data, no torch."""

from __future__ import annotations

import os


def available_cores() -> int:
    """The cores that this process may run on.

    Not torch's own default: that obeys `OMP_NUM_THREADS`, which container images like to set to 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def yield_at_barriers() -> None:
    """Have OpenMP threads sleep rather than spin while they wait for each other; call before torch is imported.

    Where another process wants the same cores (a sculpt beside the chats), a spinning thread keeps the core that the
    one it waits for needs: 32 streams beside such load ran 255 tokens/s asleep and 165 spinning. A user's own setting
    stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
