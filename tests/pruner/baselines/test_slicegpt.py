"""SliceGPT is the base with its residual stream projected onto principal axes before each block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from masquerade_engine.context import forward_context
from masquerade_engine.reference import ReferenceContext
from masquerade_pruner.baselines.slicegpt import matched_width, num_dropped, slice_model
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import masked

Case = Any  # of conftest.py


def test_nothing_sliced_is_the_dense_base(case: Case) -> None:
    sliced = slice_model(case.model, case.examples, case.model.config.hidden_size)
    tree = plant_examples(case.examples, case.model).tree
    torch.testing.assert_close(sliced.run(tree), masked(case.model)(tree), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [5, 23])
@pytest.mark.parametrize("batch", [3, 16])
def test_slicing_projects_the_residual_stream(case: Case, width: int, batch: int) -> None:
    planted = plant_examples(case.examples, case.exact)
    states = slice_model(case.exact, case.examples, width, batch=batch).run(planted.tree)[planted.rows]
    for index, wanted in enumerate(_projected(case, width, batch)):
        one = case.examples[index]
        mine = states[planted.owners == index]
        # The stock RMSNorm computes in fp32 whatever it is given, so fp64 agrees to fp32 only.
        torch.testing.assert_close(mine, wanted[len(one.prompt) - 1 : -1], atol=2e-5, rtol=0)


def _projected(case: Case, width: int, batch: int) -> list[torch.Tensor]:
    """Final normed states of every sequence alone, `[tokens, hidden]` fp64."""
    decoder = case.exact.model
    streams = [decoder.embed_tokens(torch.tensor([sequence])) for sequence in case.sequences]
    positions = [decoder.rotary_emb(one, position_ids=torch.arange(one.shape[1])[None]) for one in streams]

    def project(streams: list[torch.Tensor]) -> list[torch.Tensor]:
        rows = case.rows([one[0] for one in streams], batch)
        axes = torch.linalg.svd(rows, full_matrices=False).Vh[:width]  # uncentred principal axes
        return [one @ axes.T @ axes for one in streams]

    with forward_context(ReferenceContext()):
        for layer in decoder.layers:
            streams = project(streams)
            streams = [
                one + layer.self_attn(layer.input_layernorm(one), position_embeddings=where, attention_mask=None)[0]
                for one, where in zip(streams, positions, strict=True)
            ]
            streams = project(streams)
            streams = [one + layer.mlp(layer.post_attention_layernorm(one)) for one in streams]
        return [decoder.norm(one)[0] for one in streams]


@pytest.mark.parametrize("width", [7, 30])
def test_a_sliced_model_has_the_promised_shapes_and_size(case: Case, width: int) -> None:
    model, hidden = case.model, case.model.config.hidden_size
    sliced = slice_model(model, case.examples, width)
    assert sliced.axes.shape == (hidden, width)
    for index, layer in enumerate(sliced.layers):
        last = index == len(sliced.layers) - 1
        attention, ffn, whole = layer.attention, layer.ffn, model.model.layers[index]
        for linear, dense in ((attention.q_proj, whole.self_attn.q_proj), (ffn.gate_proj, whole.mlp.gate_proj)):
            assert linear.weight.shape == (dense.weight.shape[0], width)
        assert attention.o_proj.weight.shape == (width, whole.self_attn.o_proj.weight.shape[1])
        assert ffn.down_proj.weight.shape == (hidden if last else width, model.config.intermediate_size)
        assert layer.attention_shortcut.shape == (width, width)
        assert layer.ffn_shortcut.shape == (width, hidden if last else width)
    before = sum(parameter.numel() for parameter in model.parameters())
    table, norm = model.model.embed_tokens.weight.numel(), hidden
    head = 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    embeddings = table + sliced.axes.numel() if model.config.tie_word_embeddings else table // hidden * width
    after = embeddings + norm + head + sum(parameter.numel() for parameter in sliced.layers.parameters())
    assert num_dropped(model, width) == before - after


def test_the_matched_width_is_the_closest(case: Case) -> None:
    wanted = case.setting().num_dropped
    width = matched_width(case.model, wanted)
    off = abs(num_dropped(case.model, width) - wanted)
    assert off <= abs(num_dropped(case.model, width - 1) - wanted)
    assert off <= abs(num_dropped(case.model, width + 1) - wanted)
    assert 1 < width < case.model.config.hidden_size
