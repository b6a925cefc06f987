"""Logging: one line a record, on standard error."""

from __future__ import annotations

import logging
import sys


def logging_setup(level: str) -> None:
    """One line a record, on standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def quiet_transformers() -> None:
    """No progress bars of transformers': ours is the only display. Imports transformers, which takes seconds."""
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
