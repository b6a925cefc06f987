"""Servers for tests; what they are made of is in `running_server`, which this makes importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages

from running_server import RunningServer, Starter, add_version, servers, settings_for

from masquerade_engine.base import Base, load_base
from masquerade_server.settings import Settings


@pytest.fixture
def start_server() -> Iterator[Starter]:
    """Start servers that this test alone uses."""
    with servers() as start:
        yield start


@pytest.fixture
def settings(tmp_path: Path, tiny_base_dir: Path) -> Settings:
    """Settings with a data directory of the test's own."""
    return settings_for(tmp_path / "data", tiny_base_dir)


@pytest.fixture(scope="module")
def town(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server shared by a module: personas `mira` (two versions) and `plain` (no mask yet)."""
    with servers() as start:
        running = start(settings_for(tmp_path_factory.mktemp("town"), tiny_base_dir))
        for seed in (1, 2):
            add_version(running, "mira", "Mira", "Mira keeps a lighthouse.", seed)
        created = {"name": "Plain", "id": "plain", "text": "Plain has no mask.", "sculpt": False}
        assert running.client.post("/personas", json=created).status_code == 201
        yield running


@pytest.fixture(scope="session")
def tiny_base(tiny_base_dir: Path) -> Base:
    """The tiny base's description, as a server loads it."""
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32", device="cpu")
