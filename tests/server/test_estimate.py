"""What an estimator remembers."""

from __future__ import annotations

from typing import Any

import pytest

from masquerade_server import estimate as estimate_module
from masquerade_server.estimate import Estimator
from masquerade_server.schemas import PersonaBody
from masquerade_server.settings import Settings


async def test_each_kind_of_sculpt_is_asked_for_once_and_few_are_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "_MAX_KNOWN", 3)
    estimator, asked = Estimator(settings), []

    async def ask(spec: dict[str, Any]) -> dict[str, Any]:
        asked.append(spec["sparsity"])
        return {"seconds": spec["sparsity"]}

    monkeypatch.setattr(estimator, "_ask", ask)
    for sparsity in (0.1, 0.2, 0.1, 0.3, 0.4, 0.4):
        found = await estimator.estimate(PersonaBody(name="Mira", text="A keeper.", sparsity=sparsity))
        assert found == {"seconds": sparsity, "memory_bytes": None}
    assert asked == [0.1, 0.2, 0.3, 0.4]
    assert len(estimator._known) == 3
