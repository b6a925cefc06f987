"""Recover: train what a mask cannot say, on top of a mask that is learned and frozen.

`vectors` trains a gain per kept neuron and a bias per layer output, `lora` low-rank updates of the kept FFN together
with the vectors, `full` (the paper's) the weights of the kept neurons themselves. The start is "no recovery", and what
comes out is what was best on validation, so recovery never makes it worse. Any mask will do: recovery knows nothing of
how it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch

from masquerade_pruner.changes import Change, full_tensors, kept_weights, lora_tensors, merged_weights
from masquerade_pruner.epochs import Epochs
from masquerade_pruner.examples import Example
from masquerade_pruner.importance import down_weights, fluctuation
from masquerade_pruner.mask_learning import Loss, answer_loss, plant_micro_batches, warm_cosine
from masquerade_pruner.prior import Prior
from masquerade_pruner.reconstruction import reconstructed
from masquerade_pruner.tree import Forward, head_weight
from masquerade_pruner.workdir import Workdir

Recovery = Literal["none", "vectors", "lora", "full"]
Start = Literal["mask", "means", "prior", "reconstruction"]

SAVE_EVERY = 8  # steps between two checkpoints
_CHECKPOINT = "recovery"
_DOWN = "down_proj.weight"
_STARTS: tuple[Start, ...] = get_args(Start)
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """The numbers of a recovery; they travel in the mask's metadata."""

    steps: int = 24
    vectors_steps: int = 8  # of `vectors` at most: gains and biases are soon where they can get
    branches_per_step: int = 16
    validate_every: int = 8
    vectors_learning_rate: float = 0.01  # gains start at 1
    lora_learning_rate: float = 6e-3
    full_learning_rate: float = 1e-4
    biases: bool = True  # with the gains; a stock checkpoint of the family cannot hold them
    num_means: int = 64  # examples that mean activations are taken from, where they are not known
    num_reconstructed: int = 512  # examples that own weights are solved for over, to start from
    ridge: float = 0.3  # of that, in units of a mean squared activation
    solved_share: float = 0.85  # of the way from the base's weights to those
    lora_rank: int = 16
    lora_alpha: float = 16.0  # updates are scaled by alpha / rank

    def of(self, kind: Recovery) -> RecoverySettings:
        """The numbers for one kind: `vectors` take fewer steps."""
        return replace(self, steps=min(self.steps, self.vectors_steps)) if kind == "vectors" else self


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """A sub-network after recovery, its tensors rounded as they are stored."""

    kind: Recovery  # of `change`: `none` where nothing was better on validation than the mask by itself
    change: Change
    history: Mapping[str, Any]  # JSON

    @property
    def gain(self) -> torch.Tensor | None:
        """float16 `[layers, kept]`, in the order of the kept indices."""
        return self.change.tensors.get("gain")

    @property
    def bias(self) -> torch.Tensor | None:
        """float16 `[layers, hidden]`."""
        return self.change.tensors.get("bias")

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        """float16, by PEFT's names; empty where there are none."""
        return lora_tensors(self.change)

    @property
    def full(self) -> dict[str, torch.Tensor]:
        """In the base's type, by the base's names; empty where there are none."""
        return full_tensors(self.change)

    @property
    def num_bytes(self) -> int:
        """What is stored beside the mask."""
        vectors = [one for one in (self.gain, self.bias) if one is not None]
        return sum(one.nbytes for one in (*vectors, *self.lora.values(), *self.full.values()))


class Order(Protocol):
    """Which examples a step learns from."""

    def batch(self, step: int) -> Sequence[Example]:
        """Those of step number `step`, the same after a restart."""
        ...


def recover(
    model: torch.nn.Module,
    mask: torch.Tensor,  # [layers, intermediate], kept where it is not 0
    kind: Recovery,
    train: Sequence[Example],
    validation: Callable[[Forward], float],  # the figure to lower, on held-out examples
    settings: RecoverySettings,
    *,
    unrecovered: float | None = None,
    own_dtype: torch.dtype | None = None,
    mean_activations: torch.Tensor | None = None,
    prior: Prior | None = None,
    order: Order | None = None,  # of the training examples; by default shuffled epochs
    loss: Loss = "kl",
    question_share: float = 0.0,
    seed: int = 0,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    workdir: Workdir | None = None,
    on_layer: Callable[[int], None] = lambda done: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Recovered:
    """Train on top of a mask; the best on validation comes back, the bare mask among the candidates.

    It starts at what is best on validation by itself (the history's `start`): `mask`, nothing added; `means`, biases of
    the dropped neurons' mean contribution, with which a mask that was learned without them can be worse; `prior`, the
    prior's recovery of this kind, or own weights that have taken up its low-rank updates; `reconstruction`, own weights
    in closed form, from the prior's where these are better. `unrecovered` is validation's figure of the mask by itself,
    where it is known; `own_dtype` the type that own weights are stored in, by default the model's; `mean_activations`
    the dense base's, `[layers, intermediate]`, by default over the first of `train`.

    With a `workdir` it goes on from the last checkpoint there and ends the same, bit for bit; `on_step` gets the steps
    done and the last one's loss, `on_layer` the layers reconstructed before the first step, and both may raise to stop.
    `question_share`, `micro_batch` and `checkpointing` are `MaskLearner`'s.
    """
    bare = replace(Change.of_mask(model, mask), lora_scale=settings.lora_alpha / settings.lora_rank)
    if kind == "none":
        return Recovered("none", bare, {})
    saved = None if workdir is None else workdir.read_tensors(_CHECKPOINT)
    run = partial(
        Recoverer,
        settings=settings,
        loss=loss,
        own_dtype=own_dtype,
        question_share=question_share,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
    )
    if saved is None:
        search = _Search(bare, validation(bare.forward) if unrecovered is None else unrecovered)
        plain = _start(kind, bare, settings, seed)
        shared = _shared(kind, plain, prior)

        def means() -> torch.Tensor:
            few = train[: settings.num_means]
            return dropped_means(plain, fluctuation(model, few).mean if mean_activations is None else mean_activations)

        def is_better(name: Start, candidate: Change) -> bool:
            better = search.consider(0, run(candidate).change(), validation)
            search.start = name if better else search.start
            return better

        learner = run(_best_start(plain, means, train, settings, shared, is_better, on_layer))
        if workdir is not None:
            workdir.write_tensors(_CHECKPOINT, learner.state() | search.state())
    else:
        learner = run(replace(bare, tensors=_section(saved, "parameter", bare.kept.device)))
        learner.restore(saved)
        search = _Search.restored(bare, saved)
    order = order or Epochs(train, settings.branches_per_step, f"recover {seed}")
    while learner.step_number < settings.steps:
        search.losses.append(learner.step(order.batch(learner.step_number)))
        number = learner.step_number
        if number % settings.validate_every == 0 or number == settings.steps:
            search.consider(number, learner.change(), validation)
        if workdir is not None and (number % SAVE_EVERY == 0 or number == settings.steps):
            workdir.write_tensors(_CHECKPOINT, learner.state() | search.state())
        on_step(number, search.losses[-1])
    return Recovered("none" if search.best_step is None else kind, search.best, {"kind": kind, **search.history()})


class Recoverer:
    """A change's tensors as fp32 masters, their optimiser and one training step; state is saved and restored whole."""

    def __init__(
        self,
        start: Change,
        settings: RecoverySettings,
        loss: Loss = "kl",
        *,
        own_dtype: torch.dtype | None = None,
        question_share: float = 0.0,
        micro_batch: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        self._own_dtype = own_dtype or head_weight(start.model).dtype
        self._parameters = {
            name: tensor.detach().to(torch.float32, copy=True).requires_grad_()
            for name, tensor in start.tensors.items()
        }
        self._trained = replace(start, tensors=self._parameters)
        self._rates = [_learning_rate(name, settings) for name in self._parameters]
        self._steps = settings.steps
        self._loss = loss
        self._question_share = question_share
        self._micro_batch = micro_batch
        self._checkpointing = checkpointing
        # No weight decay: gains belong near 1, own weights near the base's, and a few dozen steps overfit little.
        groups = [{"params": [parameter]} for parameter in self._parameters.values()]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.step_number = 0

    def change(self) -> Change:
        """The present change as it is stored: own weights in their type, everything else in float16."""
        rounded = {
            name: parameter.detach().to(self._own_dtype if name.endswith(".weight") else torch.float16, copy=True)
            for name, parameter in self._parameters.items()
        }
        return replace(self._trained, tensors=rounded)

    def step(self, examples: Sequence[Example]) -> float:
        """Learn from one batch; return its loss in nats a token."""
        model = self._trained.model
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for planted in plant_micro_batches(examples, model, self._micro_batch, question_share=self._question_share):
            states = self._trained.forward(planted.tree, checkpointing=self._checkpointing)[planted.rows]
            loss = answer_loss(model, planted, states, self._loss)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * warm_cosine(self.step_number, self._steps)
        self._optimizer.step()
        self.step_number += 1
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed learner needs, as tensors."""
        state = {"step": torch.tensor(self.step_number)}
        for name, parameter in self._parameters.items():
            state[f"parameter/{name}"] = parameter.detach()
            for moment in _MOMENTS if self.step_number else ():
                state[f"{moment}/{name}"] = self._optimizer.state[parameter][moment]
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        self.step_number = int(state["step"])
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(state[f"parameter/{name}"])
            if self.step_number:
                moments = {key: state[f"{key}/{name}"].to(parameter.device, copy=True) for key in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(self.step_number)), **moments}


class _Search:
    """The best change so far, on validation, and how it went."""

    def __init__(self, bare: Change, unrecovered: float) -> None:
        self.best = bare
        self.best_step: int | None = None  # None: the bare mask
        self.start: Start = "mask"
        self.losses: list[float] = []
        self._unrecovered = self._lowest = unrecovered
        self._figures: list[tuple[int, float]] = []  # step, what validation says

    def consider(self, step: int, change: Change, validation: Callable[[Forward], float]) -> bool:
        """Keep the change where it is better than all before it, and say whether it is."""
        figure = validation(change.forward)
        self._figures.append((step, figure))
        better = figure < self._lowest
        if better:
            self.best, self.best_step, self._lowest = change, step, figure
        return better

    def history(self) -> dict[str, Any]:
        """For the report; null where training diverged."""
        return {
            "unrecovered": self._unrecovered,
            "start": self.start,
            "validation": [[step, _finite(figure)] for step, figure in self._figures],
            "best_step": self.best_step,
            "loss": [_finite(round(loss, 5)) for loss in self.losses],
        }

    def state(self) -> dict[str, torch.Tensor]:
        """The search as tensors; float64 holds its numbers exactly."""
        return {
            "search/losses": torch.tensor(self.losses, dtype=torch.float64),
            "search/figures": torch.tensor(self._figures, dtype=torch.float64),
            "search/lowest": torch.tensor([self._unrecovered, self._lowest], dtype=torch.float64),
            "search/best_step": torch.tensor(-1 if self.best_step is None else self.best_step),
            "search/start": torch.tensor(_STARTS.index(self.start)),
            **{f"best/{name}": tensor for name, tensor in self.best.tensors.items()},
        }

    @classmethod
    def restored(cls, bare: Change, state: Mapping[str, torch.Tensor]) -> _Search:
        """Continue from `state()`."""
        unrecovered, lowest = state["search/lowest"].tolist()
        search = cls(bare, unrecovered)
        search.losses = state["search/losses"].tolist()
        search._figures = [(int(step), figure) for step, figure in state["search/figures"].tolist()]
        search._lowest = lowest
        search.start = _STARTS[int(state["search/start"])]
        if int(state["search/best_step"]) >= 0:
            search.best_step = int(state["search/best_step"])
            search.best = replace(bare, tensors=_section(state, "best", bare.kept.device))
        return search


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _section(state: Mapping[str, torch.Tensor], section: str, device: torch.device) -> dict[str, torch.Tensor]:
    prefix = f"{section}/"
    return {name.removeprefix(prefix): one.to(device) for name, one in state.items() if name.startswith(prefix)}


def _start(kind: Recovery, bare: Change, settings: RecoverySettings, seed: int) -> Change:
    """The mask's own function, with all that the kind trains."""
    if kind == "full":
        return replace(bare, tensors=kept_weights(bare))
    tensors = {"gain": torch.ones(bare.kept.shape, device=bare.kept.device)}
    if settings.biases:
        hidden_size = head_weight(bare.model).shape[1]
        tensors["bias"] = torch.zeros(len(bare.kept), hidden_size, device=bare.kept.device)
    if kind == "lora":
        tensors |= _low_rank(bare, settings.lora_rank, seed)
    return replace(bare, tensors=tensors)


def _best_start(
    plain: Change,
    means: Callable[[], torch.Tensor],  # biases that bring the dropped neurons' mean contribution back
    train: Sequence[Example],
    settings: RecoverySettings,
    shared: Change | None,
    is_better: Callable[[Start, Change], bool],  # than all before it
    on_layer: Callable[[int], None],
) -> Change:
    best = plain
    if "bias" in plain.tensors:
        candidate = replace(plain, tensors={**plain.tensors, "bias": means()})
        best = candidate if is_better("means", candidate) else best
    if shared is not None:
        best = shared if is_better("prior", shared) else best
    if _DOWN in plain.tensors:
        few = _spread(train, settings.num_reconstructed)
        down = reconstructed(best, few, ridge=settings.ridge, on_layer=on_layer)
        # All the way there follows the examples too closely.
        down = torch.lerp(best.tensors[_DOWN].float(), down, settings.solved_share)
        candidate = replace(best, tensors={**best.tensors, _DOWN: down})
        best = candidate if is_better("reconstruction", candidate) else best
    return best


def _shared(kind: Recovery, plain: Change, prior: Prior | None) -> Change | None:
    """The prior's recovery for these neurons, as weights where it is own weights that are trained.

    None where there is none, or of another rank, or without the biases that are wanted.
    """
    known = None if prior is None else prior.recovery(kind, plain.kept)
    if not known:
        return None
    change = replace(plain, tensors={name: one.to(plain.kept.device).float() for name, one in known.items()})
    if kind == "full":
        change = replace(change, tensors=merged_weights(change))
    return change if _shapes(change) == _shapes(plain) else None


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    """All, or so many at even distances: examples with earlier turns stand together."""
    count = min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def _shapes(change: Change) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in change.tensors.items()}


def dropped_means(change: Change, mean_activations: torch.Tensor) -> torch.Tensor:
    """What the dropped neurons add to each layer's output on average, of the dense base's `[layers, intermediate]`.

    fp32 `[layers, hidden]`: W_down[:, dropped] · mean(h_dropped), FLAP's bias compensation (arXiv 2312.11983).
    """
    means = mean_activations.to(change.kept.device, torch.float32).scatter(1, change.kept, 0.0)
    return torch.stack([weight.float() @ mean for weight, mean in zip(down_weights(change.model), means, strict=True)])


def _low_rank(bare: Change, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """PEFT's start: A uniform within ±1/√in (its Kaiming initialisation with a = √5), B zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in kept_weights(bare).items():
        layers, outputs, inputs = weight.shape
        factor = torch.empty(layers, rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        projection = name.removesuffix(".weight")
        tensors[f"{projection}.lora_A"] = factor.to(weight.device)
        tensors[f"{projection}.lora_B"] = torch.zeros(layers, outputs, rank, device=weight.device)
    return tensors


def _learning_rate(name: str, settings: RecoverySettings) -> float:
    if name in ("gain", "bias"):
        return settings.vectors_learning_rate
    return settings.full_learning_rate if name.endswith(".weight") else settings.lora_learning_rate
