"""One prompt, many branches: a step's examples packed so that the persona prompt is computed once.

All branches share a token prefix (the persona's system turn). A pass runs the prefix and every branch's own tokens as
one ragged row `[1, num_tokens]`; attention lets a branch see the prefix and itself. Nothing is padded but attention's
own view of the branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from masquerade_engine.context import ForwardContext, forward_context
from masquerade_engine.seams import PersonaFFN, RMSNorm, decoder_layers
from masquerade_kernels.differentiable import attention, gated, norm


@dataclass(frozen=True, slots=True)
class BranchGroup:
    """Branches of like length, which attention sees as one padded batch."""

    padded: torch.Tensor  # [branches, longest]: where in the row each branch token is; padding points at token 0
    unpadded: torch.Tensor  # [tokens of the group]: the inverse, into the flattened padded view
    bias: torch.Tensor  # [branches, 1, longest, num_prefix + longest]: 0 where a token sees another, else -inf


@dataclass(frozen=True, slots=True)
class Tree:
    """The layout of one packed pass; index tensors on the model's device."""

    token_ids: torch.Tensor  # [1, num_tokens]: the prefix, then each branch's own tokens, short branches first
    positions: torch.Tensor  # [1, num_tokens]
    num_prefix: int
    groups: tuple[BranchGroup, ...]  # in the row's order
    last: torch.Tensor  # [branches]: each branch's last token in the row, in the order the branches were given


# The base, or a change of it: from a tree to the final normed hidden states of every token, `[num_tokens, hidden]`, as
# the base's head reads them. Evaluation takes every kind of change (masks, gains, other methods') as one of these.
Forward = Callable[[Tree], torch.Tensor]

# A group's longest branch is at most this many times its shortest, plus a few: padding then costs attention little.
_GROUP_SPREAD, _GROUP_SLACK = 1.5, 16


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    for index, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return index
    return min(len(first), len(last))


def plant(
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    longest_prefix: int | None = None,
) -> Tree:
    """Pack whole token sequences around their common prefix, of at most `longest_prefix` tokens.

    Every branch keeps at least one token of its own.
    """
    num_prefix = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    num_prefix = num_prefix if longest_prefix is None else min(num_prefix, longest_prefix)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    flat = [*sequences[0][:num_prefix]]
    positions = [*range(num_prefix)]
    last = [0] * len(sequences)
    groups = []
    for members in _like_length(order, [len(one) - num_prefix for one in sequences]):
        start = len(flat)
        for index in members:
            flat.extend(sequences[index][num_prefix:])
            positions.extend(range(num_prefix, len(sequences[index])))
            last[index] = len(flat) - 1
        lengths = torch.tensor([len(sequences[index]) - num_prefix for index in members])
        groups.append(_group(lengths, start, num_prefix, device, dtype))
    return Tree(
        token_ids=torch.tensor([flat], device=device),
        positions=torch.tensor([positions], device=device),
        num_prefix=num_prefix,
        groups=tuple(groups),
        last=torch.tensor(last, device=device),
    )


def _like_length(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[index] <= _GROUP_SPREAD * lengths[groups[-1][0]] + _GROUP_SLACK:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _group(lengths: torch.Tensor, start: int, num_prefix: int, device: torch.device, dtype: torch.dtype) -> BranchGroup:
    longest = int(lengths.max())
    column = torch.arange(longest)
    real = column[None, :] < lengths[:, None]  # [branches, longest]
    starts = start + torch.cumsum(lengths, 0) - lengths
    own = (column[None, :] <= column[:, None])[None] & real[:, None, :]
    # A padding row sees the prefix, or itself where there is none, so that its softmax stays finite.
    own = own | (torch.eye(longest, dtype=torch.bool)[None] & ~real[:, :, None])
    sees = torch.cat([torch.ones(len(lengths), longest, num_prefix, dtype=torch.bool), own], dim=2)
    bias = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
    return BranchGroup(
        padded=torch.where(real, starts[:, None] + column[None, :], 0).to(device),
        unpadded=real.flatten().nonzero().squeeze(1).to(device),
        bias=bias[:, None].to(device),
    )


class TreeContext:
    """The forward context of a packed pass: tree attention, and a differentiable mask in every FFN."""

    def __init__(
        self,
        tree: Tree,
        mask: torch.Tensor | None = None,  # [layers, intermediate], any float; None: the dense base
        *,
        watch: ActivationWatch | None = None,
    ) -> None:
        self._tree = tree
        self._mask = None if mask is None else mask.to(tree.token_ids.device)
        self._watch = watch
        self._folded_bias: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [1, heads, num_tokens, head_dim]
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        tree = self._tree
        prefix = F.scaled_dot_product_attention(
            query[:, :, : tree.num_prefix],
            key[:, :, : tree.num_prefix],
            value[:, :, : tree.num_prefix],
            attn_mask=self._prefix_mask(sliding_window),
            is_causal=sliding_window is None,
            scale=scaling,
            enable_gqa=True,
        )
        row = (query[0], key[0], value[0])
        branches = [self._attend_group(number, *row, scaling, sliding_window) for number in range(len(tree.groups))]
        return torch.cat([prefix[0].transpose(0, 1), *branches])[None]  # [1, num_tokens, heads, head_dim]

    def _prefix_mask(self, window: int | None) -> torch.Tensor | None:
        """`[num_prefix, num_prefix]`, True where seen; None where plain causal attention is meant."""
        if window is None:
            return None
        position = torch.arange(self._tree.num_prefix, device=self._tree.token_ids.device)
        behind = position[:, None] - position
        return (behind >= 0) & (behind < window)

    def _attend_group(
        self,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`[heads, num_tokens, head_dim]` each to `[tokens of the group, heads, head_dim]`."""
        group = self._tree.groups[number]
        num_branches, longest = group.padded.shape
        heads, _, head_dim = query.shape
        kv_heads = key.shape[0]
        share = heads // kv_heads
        # A group's query heads are folded into the query length, so keys are not repeated per head.
        folded = _pad(query, group).reshape(kv_heads, share, num_branches, longest, head_dim)
        folded = folded.permute(2, 0, 1, 3, 4).reshape(num_branches, kv_heads, share * longest, head_dim)
        seen = self._seen(key, group), self._seen(value, group)
        attended = attention(folded, *seen, self._bias(number, share, window), scaling)
        unfolded = attended.view(num_branches, kv_heads, share, longest, head_dim).permute(0, 3, 1, 2, 4)
        return unfolded.reshape(num_branches * longest, heads, head_dim).index_select(0, group.unpadded)

    def _seen(self, states: torch.Tensor, group: BranchGroup) -> torch.Tensor:
        """Prefix and own tokens of every branch, `[branches, kv_heads, num_prefix + longest, head_dim]`."""
        num_branches, longest = group.padded.shape
        kv_heads, _, head_dim = states.shape
        own = _pad(states, group).view(kv_heads, num_branches, longest, head_dim).transpose(0, 1)
        prefix = states[None, :, : self._tree.num_prefix].expand(num_branches, -1, -1, -1)
        return torch.cat([prefix, own], dim=2)

    def _bias(self, number: int, share: int, window: int | None) -> torch.Tensor:
        """The group's bias, once for each of the `share` query heads folded into the query length."""
        if (number, window) not in self._folded_bias:
            bias = self._tree.groups[number].bias
            if window is not None:
                query = self._tree.num_prefix + torch.arange(bias.shape[2], device=bias.device)
                key = torch.arange(bias.shape[3], device=bias.device)
                # A token always sees itself, so no row is left without a key.
                bias = bias.masked_fill(query[:, None] - key >= window, float("-inf"))
            self._folded_bias[number, window] = bias.repeat(1, 1, share, 1)
        return self._folded_bias[number, window]

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        mask = None if self._mask is None else self._mask[module.layer]
        gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        activations = gated(gate(hidden), up(hidden), mask)
        if self._watch is not None:
            self._watch.see(module.layer, activations)
        output: torch.Tensor = down(activations)
        return output

    def norm(self, module: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        return norm(hidden, module.weight, module.variance_epsilon)


def _pad(states: torch.Tensor, group: BranchGroup) -> torch.Tensor:
    return states.index_select(1, group.padded.flatten())  # [heads, branches * longest, head_dim]


class ActivationWatch:
    """Sums of FFN activations and of their squares over all tokens seen, `[layers, intermediate]` on the CPU.

    In fp64, so that a variance is left where a mean is large.
    """

    def __init__(self, num_layers: int, intermediate_size: int) -> None:
        self.sums = torch.zeros(num_layers, intermediate_size, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sums)
        self.num_tokens = 0

    def see(self, layer: int, activations: torch.Tensor) -> None:
        exact = activations.detach()[0].double()  # [tokens, intermediate]
        self.sums[layer] += exact.sum(dim=0).cpu()
        self.squares[layer] += exact.square().sum(dim=0).cpu()
        self.num_tokens += len(exact) if layer == 0 else 0


def head_weight(model: torch.nn.Module) -> torch.Tensor:
    """The output head, `[vocabulary, hidden]`; its device and dtype are the model's."""
    weight: torch.Tensor = model.get_parameter("lm_head.weight")
    return weight


def run_tree(model: torch.nn.Module, tree: Tree, context: TreeContext, *, checkpointing: bool = False) -> torch.Tensor:
    """The final normed hidden states of every token, `[num_tokens, hidden]`.

    With `checkpointing`, a decoder block keeps its input alone for the backward pass, which runs the block again.
    """
    decoder: Any = model.get_submodule("model")
    recomputing = _recomputing_blocks(model, context) if checkpointing and torch.is_grad_enabled() else nullcontext()
    with recomputing, forward_context(context):
        states: torch.Tensor = decoder(
            input_ids=tree.token_ids, position_ids=tree.positions, use_cache=False
        ).last_hidden_state
    return states[0]


def _recomputing_blocks(model: torch.nn.Module, context: ForwardContext) -> AbstractContextManager[None]:
    """Checkpoint every decoder block of the passes inside (torch.utils.checkpoint, arXiv 1604.06174).

    The backward pass may run in a thread of autograd's own, where no forward context is set: the recomputation brings
    its own. Nothing here draws random numbers, so no generator's state is kept.
    """
    return replaced_blocks(
        model,
        lambda block: partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), forward_context(context)),
        ),
    )


@contextmanager
def replaced_blocks(model: torch.nn.Module, instead: Callable[[Any], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """In the passes inside, call `instead(block)` where a decoder block's own forward would be called."""
    blocks = decoder_layers(model)
    for block in blocks:
        setattr(block, "forward", instead(block))  # noqa: B010  (an instance attribute over the class's method)
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, "forward")


def masked(model: torch.nn.Module, mask: torch.Tensor | None = None) -> Forward:
    """The base under a mask `[layers, intermediate]`, or as it is."""
    return lambda tree: run_tree(model, tree, TreeContext(tree, mask))
