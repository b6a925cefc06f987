"""Loading through transformers without its progress bars: a server's log is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence transformers' progress bars, and leave them as they were found."""
    from transformers.utils import logging  # noqa: PLC0415  (seconds of import)

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
