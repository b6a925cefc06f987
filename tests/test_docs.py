"""Documents point at what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Not below `benchmarks/peers`, where the peers' own packages are once they were measured.
PLACES = ("*.md", "docs/*.md", "docker/*.md", "benchmarks/results/*.md", "clients/*/*.md", "pruner/*/data/*.md")
DOCUMENTS = sorted(file for place in PLACES for file in ROOT.glob(place))
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def _anchors(document: Path) -> set[str]:
    """What headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda one: str(one.relative_to(ROOT)))
def test_links_resolve(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text("utf-8")):
        if "://" in path:
            continue
        target = (document.parent / path) if path else document
        assert target.exists(), f"{path} is not there"
        assert not anchor or anchor in _anchors(target), f"{path} has no heading {anchor}"
