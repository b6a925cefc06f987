"""What a sculpt will take, before it starts."""

from __future__ import annotations

from typing import Any

from masquerade_engine.base import Base
from masquerade_masks import round_kept
from masquerade_pruner.instructions import load_instructions
from masquerade_pruner.presets import SculptSettings, SculptSpec, shortened

# Measured with the bundled model (134 M parameters, bf16) on two cores of an AVX512-BF16 server CPU.
_BUNDLED_PARAMETERS = 134.5e6
_SECONDS_PER_ANSWER_TOKEN = 1 / 500
_SECONDS_PER_REMOTE_ANSWER = 0.25  # an assumption, not measured: two seconds each, eight at once
_SECONDS_PER_BRANCH = 3.6 / 16
_SECONDS_PER_QUESTION = 0.025
_BYTES_PER_TUNED_WEIGHT = 20  # of an own weight: its fp32 master, gradient and two moments, and two bf16 copies
_BYTES_PER_ROW_AND_NEURON = 14  # what a layer's FFN keeps for the backward pass, a token and neuron


def estimate(spec: SculptSpec, base: Base) -> dict[str, Any]:
    """Seconds by stage and peak bytes; seconds are for two cores and scale with the base's parameters."""
    instructions = load_instructions(spec.instructions)
    settings = shortened(spec.settings, len(instructions.train))
    scale = _num_parameters(base) / _BUNDLED_PARAMETERS
    held_out = settings.num_validation + settings.num_test + settings.num_test_scenes
    samples = min(
        settings.branches,
        round(settings.keep_fraction * len(instructions.train)) * settings.samples_per_question,
    )
    questions = len(instructions.train) + settings.num_validation + settings.num_test
    passes = held_out * 4 + settings.num_validation * settings.steps // settings.validate_every
    per_answer = settings.answer_tokens * _SECONDS_PER_ANSWER_TOKEN * scale
    if spec.teacher == "remote":
        per_answer = _SECONDS_PER_REMOTE_ANSWER
    recovery = _recover_branches(spec, settings)
    seconds = {
        "select": questions * _SECONDS_PER_QUESTION * scale,
        "answer": (samples + held_out) * per_answer,
        "learn": (settings.branches + settings.num_importance * 3) * _SECONDS_PER_BRANCH * scale,
        "recover": recovery * _SECONDS_PER_BRANCH * scale,
        "evaluate": (passes * _SECONDS_PER_BRANCH / 3 + settings.num_free_running * settings.answer_tokens / 500)
        * scale,
    }
    shape = base.shape
    tokens = 400 + settings.branches_per_step * (settings.answer_tokens + 60)
    activations = tokens * shape.num_layers * shape.intermediate_size * _BYTES_PER_ROW_AND_NEURON
    weights = 2 * _num_parameters(base) * base.dtype.itemsize  # the engine's copy and the learner's
    if spec.recovery == "full":
        kept = round_kept(shape.intermediate_size, spec.sparsity)
        weights += 3 * shape.num_layers * shape.hidden_size * kept * _BYTES_PER_TUNED_WEIGHT
    return {
        "seconds": {stage: round(value, 1) for stage, value in seconds.items() if value},
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_bytes": int(activations + weights),
        "steps": settings.steps,
        "num_examples": samples,
    }


def _recover_branches(spec: SculptSpec, settings: SculptSettings) -> float:
    """Branches that recovery learns from; one that is only looked at costs a third."""
    if spec.recovery == "none":
        return 0.0
    recovery = settings.recovery
    looked_at = recovery.num_means + settings.num_validation * (3 + recovery.steps // recovery.validate_every)
    return recovery.steps * recovery.branches_per_step + looked_at / 3


def _num_parameters(base: Base) -> float:
    config, shape = base.config, base.shape
    attention = 2 * shape.hidden_size * (shape.hidden_size + config.num_key_value_heads * _head_dim(base))
    return float(
        shape.num_layers * (3 * shape.hidden_size * shape.intermediate_size + attention)
        + config.vocab_size * shape.hidden_size
    )


def _head_dim(base: Base) -> int:
    return int(getattr(base.config, "head_dim", None) or base.shape.hidden_size // base.config.num_attention_heads)
