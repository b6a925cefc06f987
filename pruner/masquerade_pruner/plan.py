"""How a sculpt runs on its device: the fastest way that fits, chosen from plain numbers before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import InsufficientMemory, SettingError
from masquerade_pruner import memory
from masquerade_pruner.memory import Shape, Training, Workload

Checkpointing = Literal["auto", "on", "off"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)
ANSWER_STREAMS = 64  # answers written at once; the engine's tokens a second still grow from 32 to 64 streams
_FEWEST_STREAMS = 4
_KV_BYTES = 8192 * memory.MIB


@dataclass(frozen=True, slots=True)
class Execution:
    """What is asked of a plan; neither changes the mask by more than rounding. Raises `SettingError`."""

    checkpointing: Checkpointing = "auto"
    micro_batch: int | None = None  # branches a pass; None: as many as fit

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise SettingError("checkpointing", f"{self.checkpointing!r} is not one of {', '.join(CHECKPOINTING)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise SettingError("micro_batch", f"must be at least 1, not {self.micro_batch}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The way that was chosen, and what it takes."""

    device: str
    dtype: str
    micro_batch: int  # branches a pass of learning; a step's gradient is their sum
    checkpointing: bool
    streams: int  # answers written at once
    slot_tokens: int  # that the engine reserves for each of them, where it reserves
    keeps_learner: bool  # the learner's weights stay while the engine answers
    stage_bytes: dict[str, int]  # peak of each stage, on the device
    available_bytes: int

    @property
    def needed_bytes(self) -> int:
        """The peak of the whole sculpt."""
        return max(self.stage_bytes.values())

    @property
    def sentence(self) -> str:
        """For a progress display."""
        again = ", checkpointing" if self.checkpointing else ""
        return (
            f"{self.device}, {self.dtype}, {self.micro_batch} branches a pass{again}; "
            f"about {self.needed_bytes / 1e9:.1f} of {self.available_bytes / 1e9:.1f} GB"
        )

    @property
    def execution(self) -> dict[str, Any]:
        """The `Execution` that asks for this way of learning again, as JSON."""
        return {"checkpointing": "on" if self.checkpointing else "off", "micro_batch": self.micro_batch}

    def metadata(self) -> dict[str, Any]:
        """What a mask's settings record of it."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
        }


@dataclass(frozen=True, slots=True)
class Job:
    """One sculpt in numbers."""

    shape: Shape
    work: Workload
    kept: int  # neurons a layer
    recovery: str = "none"
    lora_rank: int = 16
    learner_item: int | None = None  # bytes of a weight where learning runs; None: as the engine's

    @property
    def recovering(self) -> Training | None:
        """What recovery trains, where there is any."""
        if self.recovery == "none":
            return None
        return memory.recovery_training(self.recovery, self.learner, self.kept, self.lora_rank)

    @property
    def learner(self) -> Shape:
        """The base in the type that learning runs it in."""
        return replace(self.shape, item=self.learner_item or self.shape.item)

    def stages(
        self, branches: int, *, checkpointing: bool, streams: int, slot_tokens: int, keeps_learner: bool
    ) -> dict[str, int]:
        """Peak bytes of each stage on the device."""
        shape, learner, work = self.shape, self.learner, self.work
        process = memory.process_bytes(shape, engine=True)
        engine = memory.answering(shape, work, streams, streams * slot_tokens)
        kept = learner.weights if keeps_learner else 0
        states = 0 if shape.cuda else memory.answer_states(shape, work)
        comparing = learner.weights + memory.held_out(learner, work)

        def training(one: Training) -> int:
            step = memory.learning(learner, work, branches, checkpointing=checkpointing, training=one)
            written = 0 if shape.cuda else memory.checkpoint_bytes(one)
            return process + states + comparing + memory.learner_state(one) + max(step, written)

        units = 0 if shape.cuda else memory.unit_vectors(shape, work)
        peaks = {
            "select": memory.process_bytes(shape, engine=False)
            + learner.weights
            + memory.scoring(learner, work)
            + units,
            "answer": process + kept + engine + states,
            "learn": training(memory.mask_training(learner)),
            **({"recover": training(self.recovering)} if self.recovering else {}),
            "evaluate": process + states + max(comparing, kept + engine + memory.compact_pack(shape, self.kept)),
        }
        return {stage: int(value * memory.fragments(shape)) for stage, value in peaks.items()}


def make_plan(
    job: Job, execution: Execution, available: DeviceMemory, host: DeviceMemory | None, *, device: str, dtype: str
) -> Plan:
    """The fastest plan whose peak is within `available.free`; `host` is the machine's memory beside a GPU.

    Raises `InsufficientMemory` with what the smallest plan that was allowed would need.
    """
    free = available.free
    if host is not None and (needed := memory.host_bytes(job.shape, job.work, job.recovering)) > host.free:
        raise InsufficientMemory("the machine beside the GPU", needed, host.free, "free some of its memory")
    smallest: Plan | None = None
    for plan in _from_fast_to_small(job, execution, free, device, dtype):
        if plan.needed_bytes <= free:
            return plan
        if smallest is None or plan.needed_bytes < smallest.needed_bytes:
            smallest = plan
    assert smallest is not None
    raise InsufficientMemory(device, smallest.needed_bytes, free, _advice(job, execution, smallest))


def _from_fast_to_small(job: Job, execution: Execution, free: int, device: str, dtype: str) -> Iterator[Plan]:
    """Every plan that the execution allows: for each way to answer, the ways to learn by the work that they are."""
    wanted = {"auto": (False, True), "on": (True,), "off": (False,)}[execution.checkpointing]
    sizes = [min(execution.micro_batch, job.work.branches_per_step)] if execution.micro_batch else _halves(job)
    learning = sorted(
        ((branches, again) for again in wanted for branches in sizes), key=lambda one: _step_work(job, *one)
    )
    answering = [(streams, keeps) for streams in _stream_counts(job) for keeps in (True, False)]
    for branches, again in learning:
        for streams, keeps in answering:
            stages = job.stages(
                branches,
                checkpointing=again,
                streams=streams,
                slot_tokens=job.work.longest,
                keeps_learner=keeps,
            )
            yield Plan(device, dtype, branches, again, streams, job.work.longest, keeps, stages, free)


def _halves(job: Job) -> list[int]:
    """A whole step, half of it, and so on to one branch."""
    sizes = [job.work.branches_per_step]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _stream_counts(job: Job) -> Iterator[int]:
    """64 and its halves, as far as their keys and values stay within the engine's budget."""
    streams = ANSWER_STREAMS
    while streams > _FEWEST_STREAMS:
        if streams * job.work.longest * job.shape.kv_token <= _KV_BYTES:
            yield streams
        streams //= 2
    yield _FEWEST_STREAMS


def _step_work(job: Job, branches: int, checkpointing: bool) -> float:
    """A step's work in token passes: the prompt is computed once a micro-batch.

    Weights are frozen, so a backward pass costs a forward pass; the dense model runs beside it, and checkpointing runs
    the forward pass again.
    """
    step = job.work.branches_per_step
    tokens = math.ceil(step / branches) * job.work.prompt + step * (job.work.question + job.work.answer)
    return tokens * (4.0 if checkpointing else 3.0)


def _advice(job: Job, execution: Execution, smallest: Plan) -> str:
    """What to do about it."""
    if execution != Execution():
        auto = min(
            one.needed_bytes for one in _from_fast_to_small(job, Execution(), 0, smallest.device, smallest.dtype)
        )
        if auto < smallest.needed_bytes:
            return f"with checkpointing and micro-batch left to it, it would need {auto / 1e9:.1f} GB"
    stage = max(smallest.stage_bytes, key=lambda name: smallest.stage_bytes[name])
    weights = job.shape.weights / 1e9
    return (
        f"that is with checkpointing and micro-batches of 1, of it {weights:.1f} GB a copy of the weights, "
        f"and most in the {stage} stage: free some memory, or take a smaller base or another device"
    )
