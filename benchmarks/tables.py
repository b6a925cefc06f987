"""Tables in Markdown."""

from __future__ import annotations

from masquerade_pruner.bootstrap import Interval


def row(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def header(*cells: str) -> list[str]:
    """A table's first two lines."""
    return [row(*cells), "|" + " --- |" * len(cells)]


def percent(share: Interval) -> str:
    """A share with its interval."""
    return f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"
