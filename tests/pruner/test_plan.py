"""Which way a sculpt runs, from numbers alone."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest

from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import InsufficientMemory, SettingError
from masquerade_pruner.memory import Shape, Workload
from masquerade_pruner.plan import Execution, Job, Plan, make_plan

GB = 1000**3
WORK = Workload(
    prompt=300,
    question=40,
    answer=64,
    context_share=0.25,
    branches_per_step=16,
    num_questions=839,
    num_answers=1000,
    num_held_out=230,
)


def shape_of(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, *, tied: bool) -> Shape:
    """A Llama 3 on a GPU in bf16."""
    attention = 2 * hidden * hidden * (1 + kv_heads / heads)
    parameters = layers * (3 * hidden * intermediate + attention) + (1 if tied else 2) * 128_256 * hidden
    return Shape(
        num_layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=128_256,
        tied=tied,
        head_norms=False,
        num_parameters=int(parameters),
        item=2,
        cuda=True,
    )


JOB_1B = Job(shape_of(16, 2048, 8192, 32, 8, tied=True), WORK, 6144)
JOB_8B = Job(shape_of(32, 4096, 14336, 32, 8, tied=False), WORK, 10752)
PLENTY = DeviceMemory(1000 * GB, 1000 * GB)


def plan(job: Job, free: float, execution: Execution | None = None) -> Plan:
    available = DeviceMemory(int(free * GB), int(free * GB))
    return make_plan(job, execution or Execution(), available, PLENTY, device="cuda:0", dtype="bfloat16")


def test_the_shapes_are_the_models() -> None:
    assert JOB_1B.shape.weights == pytest.approx(2.47e9, rel=0.01)
    assert JOB_8B.shape.weights == pytest.approx(16.06e9, rel=0.01)


def test_where_there_is_room_a_step_is_one_pass_that_keeps_everything() -> None:
    found = plan(JOB_1B, 80)
    assert (found.micro_batch, found.checkpointing, found.keeps_learner, found.streams) == (16, False, True, 64)


def test_eight_billion_fit_a_gpu_of_80_gb() -> None:
    found = plan(JOB_8B, 79)
    assert found.needed_bytes < 79 * GB
    assert found.micro_batch == 16


def test_less_memory_means_checkpointing_then_small_passes_then_one_copy_of_the_weights() -> None:
    found = [plan(JOB_8B, free) for free in (79, 40, 24)]
    needed = [one.needed_bytes for one in found]
    assert needed == sorted(needed, reverse=True)
    assert found[-1].checkpointing
    assert not found[-1].keeps_learner
    assert all(one.needed_bytes <= free * GB for one, free in zip(found, (79, 40, 24), strict=True))


@pytest.mark.parametrize("prompt", [30, 2000])
def test_of_the_ways_that_fit_the_one_with_the_least_work_is_taken(prompt: int) -> None:
    """Smaller passes compute the prompt again, checkpointing every forward pass: the prompt decides which is less."""
    job = replace(JOB_1B, work=replace(WORK, prompt=prompt))
    ways = [(size, again) for size in (16, 8, 4, 2, 1) for again in ("off", "on")]
    chosen = set()
    for free in (5, 6, 7, 8, 9, 10, 12, 16, 24):
        fitting = []
        for size, again in ways:
            with suppress(InsufficientMemory):
                fitting.append(plan(job, free, Execution(again, size)))  # type: ignore[arg-type]
        if fitting:
            found = plan(job, free)
            assert work_of(job, found) == min(work_of(job, one) for one in fitting)
            chosen.add((found.micro_batch, found.checkpointing))
    assert len(chosen) > 2


def work_of(job: Job, found: Plan) -> float:
    """Token passes of a step: the frozen model's forward and backward, the dense model's, and forward again."""
    passes = -(-16 // found.micro_batch) * job.work.prompt + 16 * (job.work.question + job.work.answer)
    return passes * (4 if found.checkpointing else 3)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(InsufficientMemory) as refused:
        plan(JOB_8B, 15.2)
    error = refused.value
    assert error.needed_bytes > 16 * GB > error.available_bytes
    needed = f"{error.needed_bytes / 1e9:.1f} GB"
    assert str(error).startswith(f"this sculpt needs about {needed}, this device (cuda:0) has 15.2 GB free; ")
    assert "16.1 GB a copy of the weights" in str(error)


def test_a_wish_is_kept_or_refused_and_told_of_the_automatic_way() -> None:
    assert plan(JOB_1B, 80, Execution("on", 4)).execution == {"checkpointing": "on", "micro_batch": 4}
    assert plan(JOB_1B, 80, Execution(micro_batch=400)).micro_batch == 16  # no more than a step has
    least = plan(JOB_8B, 24).needed_bytes / GB
    with pytest.raises(InsufficientMemory, match="left to it, it would need"):
        plan(JOB_8B, least, Execution("off", 16))


def test_long_prompts_take_fewer_streams() -> None:
    long = replace(JOB_8B, work=replace(WORK, prompt=4000))
    found = plan(long, 79)
    assert found.streams < 64
    assert found.streams * found.slot_tokens * long.shape.kv_token <= 8 * 1024**3


def test_the_machine_beside_a_gpu_has_to_hold_its_part() -> None:
    with pytest.raises(InsufficientMemory, match="the machine beside the GPU"):
        make_plan(JOB_8B, Execution(), PLENTY, DeviceMemory(GB, GB), device="cuda", dtype="bfloat16")


def test_recovery_is_reckoned_with() -> None:
    def stages(kind: str) -> dict[str, int]:
        job = replace(JOB_8B, recovery=kind)
        return job.stages(2, checkpointing=True, streams=8, slot_tokens=1000, keeps_learner=False)

    assert "recover" not in stages("none")
    vectors, lora, full = (stages(kind)["recover"] for kind in ("vectors", "lora", "full"))
    assert vectors < lora < full
    weights = 32 * 3 * 4096 * 10752
    assert full > 16 * GB + 16 * weights  # fp32 masters, gradients, two moments


def test_own_weights_of_eight_billion_are_refused_on_80_gb() -> None:
    with pytest.raises(InsufficientMemory, match="most in the recover stage"):
        plan(replace(JOB_8B, recovery="full"), 79)


def test_each_saving_saves() -> None:
    def learn(branches: int, checkpointing: bool) -> int:
        stages = JOB_8B.stages(branches, checkpointing=checkpointing, streams=8, slot_tokens=1000, keeps_learner=False)
        return stages["learn"]

    assert learn(16, False) > learn(8, False) > learn(1, False)
    assert learn(16, False) > learn(16, True) > learn(1, True)


@pytest.mark.parametrize(("field", "wish"), [("checkpointing", ("sometimes", None)), ("micro_batch", ("auto", 0))])
def test_impossible_wishes_name_their_field(field: str, wish: tuple[str, int | None]) -> None:
    with pytest.raises(SettingError) as refused:
        Execution(*wish)  # type: ignore[arg-type]
    assert refused.value.field == field
