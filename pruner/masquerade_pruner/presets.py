"""How much effort a sculpt takes, and every number it depends on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from masquerade_masks import SettingError
from masquerade_pruner.mask_learning import Loss
from masquerade_pruner.recovery import Recovery, RecoverySettings

Preset = Literal["smoke", "default", "thorough"]
Start = Literal["prior", "importance"]

MAX_SPARSITY = 0.9
MAX_TEXT_BYTES = 16_384
# Settings that no answer depends on: masks that differ in these alone are learned from the same answers.
OF_LEARNING = frozenset(
    {"sparsity", "preset", "learning_rate", "scratch_learning_rate", "loss", "start", "question_share", "cast_pull"}
    | {"num_importance", "validate_every", "num_free_running", "recovery"}
)
RECOVERIES: tuple[Recovery, ...] = get_args(Recovery)
TEACHERS = ("base", "remote")


@dataclass(frozen=True, slots=True)
class SculptSettings:
    """The numbers behind a preset; they travel in the mask's metadata."""

    keep_fraction: float = 0.4  # of the training questions, by sensitivity (the paper's 40 %)
    topic_cap: float = 0.1  # of those kept, at most this share from one topic
    samples_per_question: int = 6  # each epoch sees another answer to the same question
    answer_tokens: int = 64  # longer answers are cut, and their cut is not supervised as an end
    context_share: float = 0.25  # of the branches, with a scene line or earlier turns
    branches_per_step: int = 16
    steps: int = 24  # from a prior; more from there gain little
    learning_rate: float = 0.008  # from a prior, where only the neurons that a step dropped learn from it
    scratch_learning_rate: float = 0.012  # from importances, where all do
    loss: Loss = "kl"
    start: Start = "prior"  # what scores start from; `importance` too where the base has no prior
    question_share: float = 0.0  # of an example's weight, for the tokens before its answer
    cast_pull: float = 1.0  # of what the steps can add to a score, for a neuron that every mask of the cast keeps
    num_importance: int = 64  # examples that the initial scores are taken from
    num_validation: int = 48
    num_test: int = 150
    num_test_scenes: int = 32
    num_free_running: int = 48
    validate_every: int = 8
    recovery: RecoverySettings = field(default_factory=RecoverySettings)

    @property
    def branches(self) -> int:
        """Training branches over the whole run."""
        return self.steps * self.branches_per_step

    def rate(self, *, from_prior: bool) -> float:
        """The learning rate of scores that start from a prior, or from importances."""
        return self.learning_rate if from_prior else self.scratch_learning_rate


PRESETS: dict[str, SculptSettings] = {
    "smoke": SculptSettings(
        samples_per_question=1,
        answer_tokens=24,
        steps=6,
        num_importance=16,
        num_validation=8,
        num_test=16,
        num_test_scenes=4,
        num_free_running=4,
        validate_every=3,
        recovery=RecoverySettings(steps=4, validate_every=2, num_means=16, num_reconstructed=32),
    ),
    "default": SculptSettings(),
    "thorough": SculptSettings(
        samples_per_question=16,
        steps=240,
        num_importance=128,
        validate_every=24,
        recovery=RecoverySettings(
            steps=120, vectors_steps=120, validate_every=24, num_means=128, num_reconstructed=2048
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class SculptSpec:
    """What to sculpt. Raises `SettingError` naming the field that is out of range."""

    persona_id: str
    name: str
    text: str
    sparsity: float = 0.25  # of the FFN neurons of every layer, dropped
    preset: str = "default"
    seed: int = 0
    recovery: Recovery = "none"
    teacher: str = "base"  # or "remote": whichever the operator has set up
    instructions: Path | None = None
    numbers: SculptSettings | None = None  # in place of the preset's: for benchmarks, which try others

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise SettingError("name", "must not be empty")
        if not self.text.strip():
            raise SettingError("text", "must not be empty: it is what the persona is learned from")
        if len(self.text.encode()) > MAX_TEXT_BYTES:
            raise SettingError("text", f"is longer than the limit of {MAX_TEXT_BYTES} bytes")
        if not (
            isinstance(self.sparsity, float) and math.isfinite(self.sparsity) and 0 < self.sparsity <= MAX_SPARSITY
        ):
            raise SettingError("sparsity", f"must be above 0 and at most {MAX_SPARSITY}")
        _one_of("preset", self.preset, tuple(PRESETS))
        _one_of("recovery", self.recovery, RECOVERIES)
        _one_of("teacher", self.teacher, TEACHERS)

    @property
    def settings(self) -> SculptSettings:
        """Its own numbers or the preset's, with the recovery's own steps and the loss that the teacher allows.

        KL needs the teacher's whole distribution, which the base has at hand; of a remote one there is only the text.
        """
        settings = self.numbers or PRESETS[self.preset]
        settings = replace(settings, recovery=settings.recovery.of(self.recovery))
        return replace(settings, loss="cross_entropy") if self.teacher == "remote" else settings

    def metadata(self, instructions_digest: str, settings: SculptSettings) -> dict[str, Any]:
        """The settings that a mask file records."""
        return {
            "sparsity": self.sparsity,
            "preset": self.preset if self.numbers is None else "custom",
            "seed": self.seed,
            "teacher": self.teacher,
            "instructions_sha256": instructions_digest,
            **asdict(settings),
            "recovery": {"kind": self.recovery} | (asdict(settings.recovery) if self.recovery != "none" else {}),
        }


def shortened(settings: SculptSettings, num_train: int) -> SculptSettings:
    """Settings for a small instruction set: no more steps than its samples can feed three times over."""
    selected = max(1, round(settings.keep_fraction * num_train))
    most = max(1, 3 * selected * settings.samples_per_question // settings.branches_per_step)
    recovery = replace(settings.recovery, steps=min(settings.recovery.steps, most))
    return replace(settings, steps=min(settings.steps, most), recovery=recovery)


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(field, f"{value!r} is not one of {', '.join(allowed)}")
