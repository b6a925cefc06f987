"""What the server answers, as frozen dataclasses. Fields it may add later are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class MaskInfo:
    """The mask that serves: `kept` of `intermediate_size` FFN neurons in every layer."""

    digest: str
    bytes: int
    kept: int
    intermediate_size: int

    @property
    def sparsity(self) -> float:
        """The share of neurons dropped, after the kept count was rounded."""
        return 1 - self.kept / self.intermediate_size


@dataclass(frozen=True, slots=True)
class Version:
    """One published mask of a persona, and the text it was sculpted from."""

    number: int
    digest: str
    sparsity: float | None = None
    recovery: str | None = None
    kept: int | None = None
    intermediate_size: int | None = None
    bytes: int | None = None
    source: str | None = None  # "sculpt", "upload" or "ready"
    text: str | None = None
    created: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A sculpt. `status` is queued, running, succeeded, failed or cancelled."""

    status: str
    id: str | None = None
    stage: str | None = None
    completed: int | None = None
    total: int | None = None
    eta_s: float | None = None
    error: str | None = None
    queue_position: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in {"succeeded", "failed", "cancelled"}


@dataclass(frozen=True, slots=True)
class Persona:
    """A persona. `serving` is "base" until its first mask is published, "mask" from then on.

    `version` is the number of the mask that serves; `system_prompt` is the exact text before every chat.
    """

    id: str
    name: str
    text: str
    serving: str
    system_prompt: str | None = None
    cast: str | None = None
    version: int | None = None
    versions: tuple[Version, ...] = ()
    job: Job | None = None
    sparsity: float | None = None
    recovery: str | None = None
    mask: MaskInfo | None = None
    residency: str | None = None  # "compact", "dense" or "none"
    flagged: bool = False  # the text was changed and the mask was kept
    warning: str | None = None  # what to know about how it is served
    created: str | None = None
    updated: str | None = None


@dataclass(frozen=True, slots=True)
class WarmPersona:
    """A persona that is ready to speak. `version` is None where the unpruned base speaks for it."""

    id: str
    version: int | None = None
    prompt_tokens: int = 0  # that every chat with it begins with
    cached_tokens: int = 0  # of these, ready before
    residency: str | None = None  # "compact", "dense" or "none"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sculpt would take, from a dry run."""

    seconds: float | None = None
    memory_bytes: int | None = None
    queue_position: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # the server's whole answer


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a persona's history. Progress events carry stage, completed, total and eta_s."""

    id: int
    type: str
    job_id: str | None = None
    stage: str | None = None
    completed: int | None = None
    total: int | None = None
    eta_s: float | None = None
    loss: float | None = None
    message: str | None = None
    error: str | None = None
    version: int | None = None
    created: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # all of it, as the server sent it


@dataclass(frozen=True, slots=True)
class Report:
    """A version's fidelity report, on questions that nothing was chosen by; `data` is the whole of it."""

    format: str
    sparsity: float | None = None  # asked for
    kept: int | None = None
    intermediate_size: int | None = None
    strongest_baseline: str | None = None
    one_turn: Mapping[str, Any] = field(default_factory=dict)
    with_scene: Mapping[str, Any] = field(default_factory=dict)
    free_running: Mapping[str, Any] | None = None  # None where its weights could not be sampled from
    recovery: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """A synthesised question and answer, with the question's sensitivity to the persona."""

    question: str
    answer: str | None = None
    sensitivity: float | None = None
    topic: str | None = None
    split: str | None = None  # "train", "validation" or "test"
    scene: str | None = None
    question_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, those whose KV was there already


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a reply with several."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A whole reply. `text`, `finish_reason` and `logprobs` are those of the first choice, with `n=1` the only one.

    `finish_reason` is "stop" or "length".
    """

    id: str
    model: str
    text: str
    finish_reason: str | None
    usage: Usage | None = None
    created: int | None = None
    system_fingerprint: str | None = None  # version and digest that served it
    logprobs: Mapping[str, Any] | None = None
    choices: tuple[Choice, ...] = ()
    dropped_turns: int = 0  # of the conversation, to make it fit: see `truncation`


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed reply: `text` may be empty; `usage` comes with the last chunk alone."""

    id: str
    model: str
    text: str = ""
    index: int = 0  # of the choice it belongs to
    finish_reason: str | None = None
    usage: Usage | None = None
    system_fingerprint: str | None = None
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class MaskPair:
    """How much the masks of two personas have in common, beside what unrelated masks would have."""

    a: str
    b: str
    jaccard: float
    chance: float


@dataclass(frozen=True, slots=True)
class MaskUnion:
    """All neurons that a set of masks keeps, counted per layer."""

    neurons_per_layer: float
    fraction: float
    mean_kept_per_persona: float
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """The overlap of a cast's busiest personas; `union` is None where none of them has a mask."""

    cast: str
    personas: tuple[str, ...] = ()
    pairs: tuple[MaskPair, ...] = ()
    union: MaskUnion | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a server that is ready serves, and on what."""

    status: str
    model: str | None = None  # the base's name
    fingerprint: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A name that `model` accepts: the base or a persona."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
