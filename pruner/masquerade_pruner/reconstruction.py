"""Reconstruct: what own weights start from, in closed form, layer by layer.

What a layer's kept neurons say goes a long way towards what its dropped ones said. From the first layer to the last,
the kept columns of its down projection are solved for by least squares over a persona's own tokens, so that the
residual stream behind the layer is as near as can be to the dense base's. A layer gets its inputs from layers that are
reconstructed already, and so makes up for what they lack as well.

Least squares for a pruned layer's output: Kwon et al., arXiv 2204.09656, and SparseGPT, arXiv 2301.00774. The changed
model's inputs against the dense one's outputs: GPTAQ, arXiv 2504.02692.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from masquerade_engine.context import forward_context
from masquerade_engine.seams import PersonaFFN, decoder_layers, persona_ffns
from masquerade_pruner.changes import Change, ChangedContext, kept_weights
from masquerade_pruner.examples import Example
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import Tree, TreeContext, replaced_blocks, run_tree

BATCH = 16
_DOWN = "down_proj.weight"


@torch.no_grad()
def reconstructed(
    change: Change,
    examples: Sequence[Example],
    *,
    ridge: float,
    on_layer: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """A change's own down projection, fp32 `[layers, hidden, kept]`, solved for over the examples' tokens.

    `ridge` weighs the distance from the one it has, or the base's, in units of a layer's mean squared activation; large
    values stay near that. Of all tokens two residual streams and a layer's activations are held. `on_layer` gets the
    layers done, and may raise to stop.
    """
    batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]
    own = {**kept_weights(change), **change.tensors}
    down = own[_DOWN].to(torch.float32, copy=True)
    change = replace(change, tensors={**change.tensors, _DOWN: down})
    passes = [_Pass(change, batch, prompt_share=1 / len(batches)) for batch in batches]
    for layer in range(len(down)):
        moments = _Moments(down[layer])
        for one in passes:
            moments.add(*one.enter(layer))
        down[layer] = moments.solution(down[layer], ridge)
        for one in passes:
            one.leave(layer)
        on_layer(layer + 1)
    return down


class _Pass:
    """A few examples' tokens on their way up through the dense base and a change of it, one block at a time."""

    def __init__(self, change: Change, examples: Sequence[Example], *, prompt_share: float) -> None:
        tree = plant_examples(examples, change.model).tree
        self._blocks = decoder_layers(change.model)
        self._ffns = persona_ffns(change.model)
        self._dense_context = TreeContext(tree)
        self._context = _HaltingContext(tree, change)
        embedded, self._arguments = _block_calls(change.model, tree)
        self._dense = self._changed = embedded
        # The prompt is in every pass, and counts once.
        self._counts = torch.ones(tree.token_ids.shape[1], device=self._dense.device)
        self._counts[: tree.num_prefix] = prompt_share

    def enter(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Activations `[tokens, kept]`, what they should become for the stream `[tokens, hidden]`, and weights."""
        self._dense = self._run(layer, self._dense, self._dense_context)
        self._changed = self._run(layer, self._changed, self._context)
        dense = self._dense[0].float()
        # Whatever reads the stream norms it first: an error beside a large token is a smaller one.
        weights = self._counts * dense.square().mean(1).clamp_min(torch.finfo(dense.dtype).tiny).rsqrt()
        return self._context.activations[0], dense - self._changed[0].float(), weights

    def leave(self, layer: int) -> None:
        """Go on with the layer's output as it is by now."""
        self._changed = self._changed + self._context.output(self._ffns[layer])

    def _run(self, layer: int, stream: torch.Tensor, context: TreeContext) -> torch.Tensor:
        with forward_context(context):
            out: torch.Tensor = self._blocks[layer](stream, **self._arguments[layer])
        return out


class _HaltingContext(ChangedContext):
    """A change's context whose FFNs add nothing to the stream: what they would have added waits to be asked for."""

    activations: torch.Tensor  # of the FFN that was met last

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        self.activations = self.activate(module, hidden)
        return torch.zeros_like(hidden)

    def output(self, module: PersonaFFN) -> torch.Tensor:
        """Of the FFN that was met last, with its down projection as it is by now."""
        output = self.project_down(module, self.activations)
        del self.activations
        return output


def _block_calls(model: torch.nn.Module, tree: Tree) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The embedded tokens, and what the family's decoder hands to each of its blocks beside the stream."""
    embedded: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = []

    def noted(hidden: torch.Tensor, **others: Any) -> torch.Tensor:
        embedded.append(hidden)
        arguments.append(others)
        return hidden

    with replaced_blocks(model, lambda block: noted):
        run_tree(model, tree, TreeContext(tree))
    return embedded[0], arguments


class _Moments:
    """Sums over tokens of a layer's activations a and of what its output should be, t."""

    def __init__(self, weight: torch.Tensor) -> None:
        hidden, kept = weight.shape
        self._squares = torch.zeros(kept, kept, device=weight.device)  # of a a'
        self._products = torch.zeros(hidden, kept, device=weight.device)  # of t a'

    def add(self, activations: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Tokens `[tokens, kept]` and `[tokens, hidden]`, each of its weight."""
        activations = activations.float()
        weighted = activations * weights[:, None]
        self._squares.addmm_(weighted.T, activations)
        self._products.addmm_(targets.T, weighted)

    def solution(self, weight: torch.Tensor, ridge: float) -> torch.Tensor:
        """X `[hidden, kept]` of the least sum |t - X a|² + ridge · mean(sum a²) · |X - weight|²."""
        squares, products = self._squares.double(), self._products.double()
        pull = ridge * squares.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        squares.diagonal().add_(pull)
        solution: torch.Tensor = torch.linalg.solve(squares, products + pull * weight.double(), left=False)
        return solution.float()
