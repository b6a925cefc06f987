"""Tiny models of several families in fp32 and fp64, and what each sequence alone gives in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from masquerade_engine.base import load_base
from masquerade_engine.context import forward_context
from masquerade_engine.reference import ReferenceContext
from masquerade_pruner.baselines import Setting
from masquerade_pruner.examples import Example
from masquerade_pruner.tree import common_prefix

KEPT = 40
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-biased-odd": (
        "llama",
        {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "hidden_size": 36,
            "head_dim": 10,
            "intermediate_size": 61,
            "num_hidden_layers": 4,
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
}


@dataclass(frozen=True)
class Case:
    """One family's tiny model with random norms and biases, and the same in fp64."""

    model: Any
    exact: Any
    examples: list[Example]

    def setting(self, kept: int = KEPT, seed: int = 0) -> Setting:
        return Setting(self.model, self.examples, kept, seed)

    def rows(self, per_sequence: Sequence[torch.Tensor], batch: int = 16) -> torch.Tensor:
        """Of every sequence's `[tokens, width]`, the calibration tokens: shared prompts count once a batch."""
        parts = []
        for start in range(0, len(self.examples), batch):
            sequences = self.sequences[start : start + batch]
            shared = min(common_prefix(sequences), min(map(len, sequences)) - 1)
            mine = per_sequence[start : start + batch]
            parts += [mine[0][:shared], *(one[shared:] for one in mine)]
        return torch.cat(parts)

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        return [(*one.prompt, *one.answer) for one in self.examples]

    def inputs_of(self, path: str, sequences: Sequence[Sequence[int]] | None = None) -> list[torch.Tensor]:
        """What a module of the fp64 model reads, `[tokens, width]` a sequence, each run alone."""
        seen: list[torch.Tensor] = []
        hook = self.exact.get_submodule(path).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
        for sequence in sequences or self.sequences:
            self.logits(sequence)
        hook.remove()
        return [one.detach() for one in seen]

    def logits(self, sequence: Sequence[int], coefficients: torch.Tensor | None = None) -> torch.Tensor:
        """The fp64 model's, `[tokens, vocabulary]`, differentiable."""
        with forward_context(ReferenceContext(coefficients)):
            logits: torch.Tensor = self.exact(input_ids=torch.tensor([list(sequence)]), use_cache=False).logits
        return logits[0]

    def cross_entropy(self, examples: Sequence[Example], coefficients: torch.Tensor | None = None) -> torch.Tensor:
        """The mean over examples of the mean over their answers' tokens."""
        losses = []
        for one in examples:
            logits = self.logits((*one.prompt, *one.answer), coefficients)[len(one.prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(one.answer)))
        return torch.stack(losses).mean()


@pytest.fixture(scope="session", params=FAMILIES)
def case(
    request: pytest.FixtureRequest,
    make_tiny_base: Callable[..., Path],
    make_examples: Callable[..., list[Example]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    model_type, config = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = load_base(str(make_tiny_base(folder / "base", model_type, **config)), cache_dir=folder, dtype="fp32")
    model = base.build_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at one and biases at zero, which would hide a forgotten one
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return Case(model, copy.deepcopy(model).double(), make_examples(7, seed=5))
