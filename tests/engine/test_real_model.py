"""The bundled model, through every path."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from masquerade_engine import (
    Base,
    ChatMessage,
    Engine,
    EngineSettings,
    PersonaFunction,
    persona_system_prompt,
    render_chat,
)
from masquerade_engine.reference import reference_logits

pytestmark = pytest.mark.real_model


def test_dense_compact_and_reference_agree(
    real_base: Base, make_function: Callable[..., PersonaFunction], forced_logits: Callable[..., torch.Tensor]
) -> None:
    """float32: the largest difference on a logit is below 1e-3."""
    function = make_function(real_base, 1, sparsity=0.25, gain=True)
    assert function.subnetwork is not None
    prompt = persona_system_prompt("Mara", "A ferrywoman on a slow brown river. She trusts nobody who pays in advance.")
    tokens = render_chat(real_base.tokenizer, prompt, [ChatMessage("user", "What do you carry across tonight?")])
    stops = [40, *range(len(tokens) - 3, len(tokens) + 1)]
    coefficients = torch.from_numpy(function.subnetwork.coefficients())
    expected = reference_logits(real_base.build_model(), torch.tensor([tokens]), coefficients)[0]
    expected = expected[[stop - 1 for stop in stops]]
    with Engine(real_base, EngineSettings(max_num_seqs=2, max_model_len=256)) as engine:
        dense = forced_logits(engine, function, tokens, stops)
        engine.install(function)
        while engine.residency(function.digest) != "compact":
            time.sleep(0.02)
        compact = forced_logits(engine, function, tokens, stops)
    differences = [(a - b).abs().max() for a, b in ((dense, expected), (compact, expected), (dense, compact))]
    assert max(differences) < 1e-3
    assert expected.std() > 1  # a model that says something
