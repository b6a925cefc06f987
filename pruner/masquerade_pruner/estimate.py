"""What a sculpt will take, before it starts: the plan that fits its device, seconds by stage, peak bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from masquerade_engine.base import Base
from masquerade_engine.device_memory import DeviceMemory, device_memory, host_memory
from masquerade_engine.prompt import ChatMessage, persona_system_prompt, render_chat
from masquerade_engine.threads import available_cores
from masquerade_masks import round_kept
from masquerade_pruner.instructions import InstructionSet, load_instructions
from masquerade_pruner.learner import learning_dtype
from masquerade_pruner.memory import Shape, Workload
from masquerade_pruner.plan import Execution, Job, Plan, make_plan
from masquerade_pruner.presets import SculptSettings, SculptSpec, shortened

_LONG_QUESTION = 0.9  # the quantile of the questions' lengths that memory is reckoned with
_SECONDS_PER_REMOTE_ANSWER = 0.25  # an assumption, not measured: two seconds each, eight at once


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device sustains, as floating-point operations a second."""

    learning: float  # passes over a thousand tokens and more
    answering: float  # 64 streams of one token each, which read every weight for each token


# Two cores of an AVX512-BF16 server CPU, bf16, bundled model: 3.6 s for a step of 16 branches of 115 tokens, and 500
# answer tokens a second. In float32 learning took twice the time, and so did answers; where float32 is faster, answers
# in bf16 took 1.35 times as long.
_TWO_CORES = Speed(learning=0.42e12, answering=0.134e12)
_FP32_SLOWDOWN, _SLOW_BF16 = 2.0, 1.35
# bf16 operations and bytes a second by compute capability, from data sheets (A100, RTX 3090, RTX 4090, H100, B200), of
# which 35 and 50 % are taken to be sustained. Not measured here.
_CUDA = {(8, 0): (312e12, 1.6e12), (8, 6): (71e12, 0.9e12), (8, 9): (165e12, 1.0e12), (9, 0): (989e12, 3.3e12)}
_CUDA_LATER, _CUDA_EARLIER = (2250e12, 8.0e12), (65e12, 0.3e12)


def estimate(
    spec: SculptSpec, base: Base, execution: Execution | None = None, *, behind_others: bool = False
) -> dict[str, Any]:
    """Seconds by stage, peak bytes, and the plan.

    A job that waits `behind_others` is measured against all of the device's memory: theirs will be free by then.
    Raises `InsufficientMemory` for what does not fit.
    """
    instructions = load_instructions(spec.instructions)
    settings = shortened(spec.settings, len(instructions.train))
    job = describe(spec, base, settings, instructions)
    plan = plan_for(job, base, execution or Execution(), behind_others=behind_others)
    seconds = stage_seconds(job, settings, plan, speed_of(base))
    if spec.teacher == "remote":
        seconds["answer"] = job.work.num_answers * _SECONDS_PER_REMOTE_ANSWER
    return {
        "seconds": {stage: round(value, 1) for stage, value in seconds.items() if value},
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_bytes": plan.needed_bytes,
        "available_bytes": plan.available_bytes,
        "plan": {**plan.metadata(), "summary": plan.sentence, "stage_bytes": plan.stage_bytes},
        "steps": settings.steps,
        "num_examples": job.work.num_answers - job.work.num_held_out,
    }


def plan_for(job: Job, base: Base, execution: Execution, *, behind_others: bool = False) -> Plan:
    """The plan for the base's device as it is now. Raises `InsufficientMemory`."""
    free = _all_of if behind_others else _as_it_is
    return make_plan(
        job,
        execution,
        free(device_memory(base.device)),
        free(host_memory()) if base.device.type == "cuda" else None,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )


def _as_it_is(memory: DeviceMemory) -> DeviceMemory:
    return memory


def _all_of(memory: DeviceMemory) -> DeviceMemory:
    return replace(memory, free=memory.total)


def describe(spec: SculptSpec, base: Base, settings: SculptSettings, instructions: InstructionSet) -> Job:
    """The sculpt in numbers. Raises `SettingError` for a base that cannot chat."""
    system_prompt = persona_system_prompt(spec.name, spec.text)
    by_length = sorted((one.text for one in instructions.train), key=len)
    long = by_length[int(_LONG_QUESTION * (len(by_length) - 1))]
    prompt, whole = (
        len(render_chat(base.tokenizer, system_prompt, [ChatMessage("user", text)])) for text in ("", long)
    )
    selected = round(settings.keep_fraction * len(instructions.train))
    held_out = sum(
        min(wanted, have)
        for wanted, have in (
            (settings.num_validation, len(instructions.validation)),
            (settings.num_test, len(instructions.test)),
            (settings.num_test_scenes, len(instructions.test)),
        )
    )
    work = Workload(
        prompt=prompt,
        question=whole - prompt,
        answer=settings.answer_tokens,
        context_share=settings.context_share,
        branches_per_step=settings.branches_per_step,
        num_questions=len(instructions.train) + len(instructions.validation) + len(instructions.test),
        num_answers=min(settings.branches, selected * settings.samples_per_question) + held_out,
        num_held_out=held_out,
    )
    shape = Shape.of(base.config, base.dtype.itemsize, cuda=base.device.type == "cuda")
    kept = round_kept(shape.intermediate, spec.sparsity)
    recovery = settings.recovery
    return Job(shape, work, kept, spec.recovery, recovery.lora_rank, learning_dtype(base).itemsize)


def speed_of(base: Base) -> Speed:
    """What the base's device sustains."""
    if base.device.type == "cuda":
        return cuda_speed(torch.cuda.get_device_capability(base.device), base.dtype.itemsize)
    pairs, learning, answering = available_cores() / 2, 1.0, 1.0
    if learning_dtype(base) == torch.float32:
        learning = _FP32_SLOWDOWN
        answering = _FP32_SLOWDOWN if base.dtype == torch.float32 else _SLOW_BF16
    return Speed(_TWO_CORES.learning * pairs / learning, _TWO_CORES.answering * pairs / answering)


def cuda_speed(capability: tuple[int, int], item: int) -> Speed:
    """What a GPU of a compute capability sustains: answering is bound by the bytes of weights that a token reads."""
    known = _CUDA_LATER if capability > max(_CUDA) else _CUDA_EARLIER
    operations, num_bytes = _CUDA.get(capability, known)
    tokens_a_read = 32  # streams under way on average, of 64
    return Speed(0.35 * operations, min(0.35 * operations, 0.5 * num_bytes / item * 2 * tokens_a_read))


def stage_seconds(job: Job, settings: SculptSettings, plan: Plan, speed: Speed) -> dict[str, float]:
    """Seconds of each stage: two operations a weight and token, attention and the head included in the speeds."""
    work, weights = job.work, job.shape.num_parameters
    forward = 2.0 * weights / speed.learning  # seconds a token
    branch = work.question + work.answer * 0.9 + work.context_share * 1.2 * (work.question + work.answer)
    micro_batches = -(-settings.branches_per_step // plan.micro_batch)
    step = micro_batches * work.prompt + settings.branches_per_step * branch
    passes = 3.0 if plan.checkpointing else 2.0
    # As for a base without a prior: with one, scores start from there, and a fifth of this is left.
    importance = settings.num_importance * 4 * (branch + work.prompt / 4)
    held_out = branch + work.prompt / 16
    recovery = settings.recovery
    looked_at = settings.num_validation * (2 + recovery.steps // recovery.validate_every)
    if job.recovery == "full":  # dense and changed, and the moments between neurons
        looked_at += 2 * min(recovery.num_reconstructed, work.num_answers - work.num_held_out)
    recovering = 0.0 if job.recovery == "none" else recovery.steps * step * passes + looked_at * held_out
    compared = 2 * work.num_held_out
    chosen_by = settings.num_validation * (settings.steps // settings.validate_every + 3)
    answers = (work.num_answers + settings.num_free_running) * work.answer * 0.9
    answering = 2.0 * weights / speed.answering
    shares = work.num_answers / (work.num_answers + settings.num_free_running)
    return {
        "select": work.num_questions * (work.question + work.prompt / 32) * forward,
        "answer": answers * shares * answering,
        "learn": (settings.steps * step * passes + importance + chosen_by * held_out) * forward,
        "recover": recovering * forward,
        "evaluate": compared * held_out * forward + answers * (1 - shares) * answering,
    }
