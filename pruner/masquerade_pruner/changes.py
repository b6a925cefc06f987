"""Changes of the base: a sub-network as a function that gradients flow through, with whatever recovery added to it.

Only kept neurons are computed. Their weights are gathered from the base in every pass (a layer of the bundled model in
a fraction of a millisecond), so a change holds no second copy of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from masquerade_engine.seams import PersonaFFN, persona_ffns
from masquerade_kernels.differentiable import gated
from masquerade_masks import MaskShapeError
from masquerade_pruner.tree import Tree, TreeContext, run_tree

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The axis of a change's tensors that counts kept neurons; others have none.
_NEURON_AXES = {"gain": 1, "gate_proj.lora_B": 1, "up_proj.lora_B": 1, "down_proj.lora_A": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """A base under a mask and, by name, what recovery added; `forward` is a `tree.Forward`.

    `tensors` are stacked over layers and may be of any float type; what is absent changes nothing:

    - `gain` `[layers, kept]` and `bias` `[layers, hidden]`, applied in fp32 as they are served;
    - `<projection>.lora_A` `[layers, rank, in]` and `<projection>.lora_B` `[layers, out, rank]`, added to the base's
      weight as `lora_scale` · B A;
    - `<projection>.weight` `[layers, out, in]`, in place of the base's.

    `in` and `out` are those of the kept neurons alone: `gate_proj` and `up_proj` go from hidden to kept, `down_proj`
    back.
    """

    model: torch.nn.Module
    kept: torch.Tensor  # [layers, kept] int64, ascending in each layer
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lora_scale: float = 1.0

    @classmethod
    def of_mask(cls, model: torch.nn.Module, mask: torch.Tensor) -> Change:
        """The mask `[layers, intermediate]` (kept where it is not 0) and nothing else.

        Raises `MaskShapeError` where two layers keep different numbers of neurons.
        """
        counts = mask.count_nonzero(dim=1)
        if bool((counts != counts[0]).any()):
            raise MaskShapeError(f"every layer keeps the same number of neurons; these keep {counts.tolist()}")
        kept = mask.nonzero()[:, 1].view(mask.shape[0], -1)
        return cls(model, kept.to(persona_ffns(model)[0].get_parameter("down_proj.weight").device))

    def forward(self, tree: Tree, *, checkpointing: bool = False) -> torch.Tensor:
        """The final normed hidden states of every token, `[num_tokens, hidden]`; `checkpointing` as in `run_tree`."""
        return run_tree(self.model, tree, ChangedContext(tree, self), checkpointing=checkpointing)


class ChangedContext(TreeContext):
    """The forward context of a pass through a change; what is written into its tensors later is seen."""

    def __init__(self, tree: Tree, change: Change) -> None:
        super().__init__(tree)
        self._kept = change.kept
        self._lora_scale = change.lora_scale
        # Unbound once a pass: gradients of single layers are then stacked once, not added up in tensors of full size.
        self._layers = {name: tensor.unbind(0) for name, tensor in change.tensors.items()}

    def ffn(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        return self.project_down(module, self.activate(module, hidden))

    def activate(self, module: PersonaFFN, hidden: torch.Tensor) -> torch.Tensor:
        """What the kept neurons say with their gains, `[1, tokens, kept]`."""
        gate, up = (self._project(module, name, hidden) for name in ("gate_proj", "up_proj"))
        return gated(gate, up, self._of(module, "gain"))

    def project_down(self, module: PersonaFFN, activations: torch.Tensor) -> torch.Tensor:
        """The FFN's output from `activate`'s, `[1, tokens, hidden]`."""
        output = self._project(module, "down_proj", activations)
        bias = self._of(module, "bias")
        return output if bias is None else (output.to(_at_least_fp32(bias)) + bias).to(activations.dtype)

    def _of(self, module: PersonaFFN, name: str) -> torch.Tensor | None:
        return self._layers[name][module.layer] if name in self._layers else None

    def _project(self, module: PersonaFFN, name: str, inputs: torch.Tensor) -> torch.Tensor:
        weight = self._of(module, f"{name}.weight")
        if weight is None:
            kept = self._kept[module.layer]
            weight = module.get_parameter(f"{name}.weight").index_select(1 if name == "down_proj" else 0, kept)
        output = F.linear(inputs, weight.to(inputs.dtype))
        down, up = self._of(module, f"{name}.lora_A"), self._of(module, f"{name}.lora_B")
        if down is None or up is None:
            return output
        return output + self._lora_scale * F.linear(F.linear(inputs, down.to(inputs.dtype)), up.to(inputs.dtype))


def _at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def lora_tensors(change: Change) -> dict[str, torch.Tensor]:
    """The low-rank updates in PEFT's names and shapes, over the full intermediate size: 0 for dropped neurons."""
    intermediate_size = persona_ffns(change.model)[0].get_parameter("down_proj.weight").shape[1]
    named = {}
    for stacked, tensor in change.tensors.items():
        projection, _, factor = stacked.partition(".")
        if factor not in ("lora_A", "lora_B"):
            continue
        for layer, one in enumerate(tensor):
            name = f"base_model.model.model.layers.{layer}.mlp.{projection}.{factor}.weight"
            if (projection == "down_proj") == (factor == "lora_A"):  # the side of the neurons
                axis = 1 if factor == "lora_A" else 0
                named[name] = _spread(one, change.kept[layer], intermediate_size, axis=axis)
            else:
                named[name] = one.clone()
    return named


def _spread(compact: torch.Tensor, kept: torch.Tensor, intermediate_size: int, *, axis: int) -> torch.Tensor:
    shape = list(compact.shape)
    shape[axis] = intermediate_size
    return compact.new_zeros(shape).index_copy_(axis, kept, compact)


def merged_weights(change: Change) -> dict[str, torch.Tensor]:
    """Own weights, fp32, that do what gains and low-rank updates do; they cannot do what a bias does."""
    merged = {}
    for name, weight in kept_weights(change).items():
        projection = name.removesuffix(".weight")
        down, up = (change.tensors[f"{projection}.{factor}"].float() for factor in ("lora_A", "lora_B"))
        merged[name] = weight.float() + change.lora_scale * up @ down
    if "gain" in change.tensors:
        merged["down_proj.weight"] *= change.tensors["gain"].float()[:, None, :]
    return merged


def counted(name: str, tensor: torch.Tensor) -> int | None:
    """How many kept neurons a change's tensor of this name is of; None where it has no axis for them."""
    axis = _NEURON_AXES.get(name)
    return None if axis is None else tensor.shape[axis]


def moved(
    tensors: Mapping[str, torch.Tensor], before: torch.Tensor, after: torch.Tensor, num_neurons: int
) -> dict[str, torch.Tensor]:
    """A change's tensors (no own weights) for other kept neurons: from those `before` to those `after`.

    Both are `[layers, kept]`. Neurons that were not kept before have a gain of 1 and updates of 0.
    """
    return {
        name: _moved(one, _NEURON_AXES[name], before, after, num_neurons, 1.0 if name == "gain" else 0.0)
        if name in _NEURON_AXES
        else one
        for name, one in tensors.items()
    }


def _moved(
    tensor: torch.Tensor, axis: int, before: torch.Tensor, after: torch.Tensor, num_neurons: int, fill: float
) -> torch.Tensor:
    by_neuron = tensor.movedim(axis, 1)  # [layers, kept, ...]
    rest = by_neuron.shape[2:]
    of_all = by_neuron.new_full((len(before), num_neurons, *rest), fill)
    layers = torch.arange(len(before))[:, None]
    of_all[layers, before] = by_neuron
    return of_all[layers, after].movedim(1, axis)


def full_tensors(change: Change) -> dict[str, torch.Tensor]:
    """The own weights by the base's names, rows and columns in the order of the kept indices."""
    return {
        f"model.layers.{layer}.mlp.{name}": one.clone()
        for name, tensor in change.tensors.items()
        if name.endswith(".weight")
        for layer, one in enumerate(tensor)
    }


def kept_weights(change: Change) -> dict[str, torch.Tensor]:
    """The base's weights of the kept neurons, stacked, as a change holds its own."""
    ffns = persona_ffns(change.model)
    return {
        f"{name}.weight": torch.stack(
            [
                ffn.get_parameter(f"{name}.weight").index_select(1 if name == "down_proj" else 0, kept)
                for ffn, kept in zip(ffns, change.kept, strict=True)
            ]
        )
        for name in PROJECTIONS
    }
