"""SliceGPT (arXiv 2401.15024): rotate the residual stream onto its principal axes, and cut the last ones off.

The norms' weights are folded into the linears behind them, so that RMSNorm commutes with rotations. Before every
attention and every FFN block the stream has axes of its own, the eigenvectors of its second moments over the
calibration tokens *in the network sliced so far*; a shortcut matrix turns the residual from one block's axes to the
next's. The last block writes in the base's own axes, so that the base's final norm and head read it as it is (the
authors rotate the head instead, unsliced as well: the same function).

Parameters are matched as a whole: shortcuts count, and so does what the embeddings cost. A base that ties its head to
its embeddings keeps the table and gets a matrix `[hidden, width]` behind it, the cheaper of the two ways to slice it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from masquerade_engine.context import forward_context
from masquerade_engine.seams import decoder_layers
from masquerade_pruner.baselines.base import Baseline, Setting
from masquerade_pruner.baselines.sharing import with_children
from masquerade_pruner.examples import Example
from masquerade_pruner.mask_learning import plant_examples
from masquerade_pruner.tree import Tree, TreeContext, head_weight

Positions = tuple[torch.Tensor, torch.Tensor]  # rotary cosines and sines

_READERS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
_WRITER = {"self_attn": "o_proj", "mlp": "down_proj"}


def slicegpt(setting: Setting) -> Baseline:
    """The base sliced to the width that drops nearly as many parameters as the setting's masks."""
    width = matched_width(setting.model, setting.num_dropped)
    sliced = slice_model(setting.model, setting.examples, width)
    return Baseline(sliced.run, num_dropped(setting.model, width))


def matched_width(model: nn.Module, wanted: int) -> int:
    """The width whose dropped parameters come closest to `wanted`."""
    hidden = head_weight(model).shape[1]
    return min(range(1, hidden + 1), key=lambda width: abs(num_dropped(model, width) - wanted))


def num_dropped(model: nn.Module, width: int) -> int:
    """Parameters that slicing to `width` does without, less those that it adds."""
    layers = decoder_layers(model)
    hidden = head_weight(model).shape[1]
    whole = sum(parameter.numel() for parameter in layers.parameters())
    sliced = sum(_sliced_size(layer, width, width) for layer in layers)
    sliced += _sliced_size(layers[-1], width, hidden) - _sliced_size(layers[-1], width, width)
    vocabulary = head_weight(model).shape[0]
    return whole - sliced + (-hidden * width if _tied(model) else vocabulary * (hidden - width))


def _sliced_size(layer: nn.Module, width: int, width_after: int) -> int:
    """Parameters of a sliced layer with its two shortcuts; norms of the attention's own stay as they are."""
    size = width * width + width * width_after
    for block, after in (("self_attn", width), ("mlp", width_after)):
        changed = (*_READERS[block], _WRITER[block])
        for name, parameter in layer.get_submodule(block).named_parameters():
            linear = name.split(".")[0]
            if linear not in changed:
                size += parameter.numel()
            elif linear == _WRITER[block]:
                size += parameter.numel() // parameter.shape[0] * after
            else:
                size += parameter.shape[0] * (width if parameter.dim() == 2 else 1)
    return size


def _tied(model: nn.Module) -> bool:
    return head_weight(model) is model.get_parameter("model.embed_tokens.weight")


class SlicedLayer(nn.Module):
    """A decoder layer over a sliced stream: `[1, tokens, width before]` to `[1, tokens, width after]`."""

    def __init__(
        self,
        attention: nn.Module,
        attention_shortcut: torch.Tensor,  # [width before, width between]
        ffn: nn.Module,
        ffn_shortcut: torch.Tensor,  # [width between, width after]
        norm: _SlicedNorm,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_shortcut = nn.Parameter(attention_shortcut, requires_grad=False)
        self.ffn = ffn
        self.ffn_shortcut = nn.Parameter(ffn_shortcut, requires_grad=False)
        self._norm = norm

    def forward(self, stream: torch.Tensor, positions: Positions) -> torch.Tensor:
        attended, _ = self.attention(self._norm(stream), position_embeddings=positions, attention_mask=None)
        stream = stream @ self.attention_shortcut + attended
        output: torch.Tensor = stream @ self.ffn_shortcut + self.ffn(self._norm(stream))
        return output


class _SlicedNorm:
    """RMSNorm without a weight; the mean is over the base's hidden size, of which the stream holds the larger part."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        self._hidden_size = hidden_size
        self._epsilon = epsilon

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        wide = stream if stream.dtype == torch.float64 else stream.float()
        variance = wide.square().sum(dim=-1, keepdim=True) / self._hidden_size
        return (wide * torch.rsqrt(variance + self._epsilon)).to(stream.dtype)


class SlicedModel:
    """The base's embeddings, final norm and rotary frequencies around sliced layers."""

    def __init__(self, model: nn.Module, axes: torch.Tensor, layers: Sequence[SlicedLayer]) -> None:
        self.axes = axes  # [hidden, width]: of the stream that enters the first layer
        self.layers = nn.ModuleList(layers)
        self._decoder: Any = model.get_submodule("model")

    def run(self, tree: Tree) -> torch.Tensor:
        """The final normed hidden states of every token, `[num_tokens, hidden]`, for the base's head."""
        with forward_context(TreeContext(tree)):
            stream = self._decoder.embed_tokens(tree.token_ids) @ self.axes
            positions = self._decoder.rotary_emb(stream, position_ids=tree.positions)
            for layer in self.layers:
                stream = layer(stream, positions)
            states: torch.Tensor = self._decoder.norm(stream)
        return states[0]


@torch.no_grad()
def slice_model(model: nn.Module, examples: Sequence[Example], width: int, *, batch: int = 16) -> SlicedModel:
    """Slice block by block, each by the second moments of the stream that the slices before it leave."""
    decoder: Any = model.get_submodule("model")
    hidden = head_weight(model).shape[1]
    trees = [plant_examples(examples[at : at + batch], model).tree for at in range(0, len(examples), batch)]
    whole = [decoder.embed_tokens(tree.token_ids) for tree in trees]  # streams in the base's axes
    positions = [decoder.rotary_emb(one, position_ids=tree.positions) for one, tree in zip(whole, trees, strict=True)]
    norm = _SlicedNorm(hidden, decoder.norm.variance_epsilon)
    first = axes = principal_axes(whole)[:, :width]
    streams = [_project(one, axes) for one in whole]
    layers: list[SlicedLayer] = []
    for number, layer in enumerate(decoder_layers(model)):
        # 1. Attention reads the sliced stream and writes in the base's axes, which shows the stream between the blocks.
        attention = _reading(layer, "self_attn", "input_layernorm", axes)
        for at, (tree, stream) in enumerate(zip(trees, streams, strict=True)):
            with forward_context(TreeContext(tree)):
                attended, _ = attention(norm(stream), position_embeddings=positions[at], attention_mask=None)
            whole[at] = _project(stream, axes.T) + attended
        between = principal_axes(whole)[:, :width]
        streams = [_project(one, between) for one in whole]
        # 2. The same for the FFN, whose input is now sliced as well.
        ffn = _reading(layer, "mlp", "post_attention_layernorm", between)
        for at, (tree, stream) in enumerate(zip(trees, streams, strict=True)):
            with forward_context(TreeContext(tree)):
                whole[at] = _project(stream, between.T) + ffn(norm(stream))
        last = number == len(decoder_layers(model)) - 1
        after = torch.eye(hidden, dtype=torch.float64, device=axes.device) if last else principal_axes(whole)[:, :width]
        streams = [_project(one, after) for one in whole]
        # 3. Both blocks write in the axes that the next one reads.
        layers.append(
            SlicedLayer(
                _writing(attention, "self_attn", between),
                (axes.T @ between).to(head_weight(model)),
                _writing(ffn, "mlp", after),
                (between.T @ after).to(head_weight(model)),
                norm,
            )
        )
        axes = after
    return SlicedModel(model, first.to(head_weight(model)), layers)


def principal_axes(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eigenvectors of the streams' second moments, largest first, `[hidden, hidden]` fp64 in columns."""
    moments = torch.stack([stream[0].double().T @ stream[0].double() for stream in streams]).sum(dim=0)
    vectors: torch.Tensor = torch.linalg.eigh(moments).eigenvectors
    return vectors.flip(1)


def _project(stream: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    return stream @ axes.to(stream)


def _reading(layer: nn.Module, block: str, norm: str, axes: torch.Tensor) -> nn.Module:
    """A block whose linears read a stream in `axes`, the norm's weight folded into them."""
    module = layer.get_submodule(block)
    scale = layer.get_parameter(f"{norm}.weight").double()
    linears = {name: module.get_submodule(name) for name in _READERS[block]}
    return with_children(
        module,
        **{name: _linear(_weight(one) * scale @ axes, _bias(one), _weight(one)) for name, one in linears.items()},
    )


def _writing(module: nn.Module, block: str, axes: torch.Tensor) -> nn.Module:
    """A block whose output is in `axes`."""
    linear = module.get_submodule(_WRITER[block])
    bias = _bias(linear)
    turned = None if bias is None else axes.T @ bias.double()
    return with_children(
        module, **{_WRITER[block]: _linear(axes.T @ _weight(linear).double(), turned, _weight(linear))}
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> nn.Linear:
    """A frozen linear of these fp64 weights in the dtype and on the device of `like`."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(like), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(like), requires_grad=False)
    return linear


def _weight(linear: nn.Module) -> torch.Tensor:
    return linear.get_parameter("weight")


def _bias(linear: nn.Module) -> torch.Tensor | None:
    bias = getattr(linear, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None
