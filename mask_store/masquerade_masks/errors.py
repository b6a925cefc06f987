"""Every error of Masquerade. `str(error)` is the sentence a user reads; the server gives the HTTP status.

MasqueradeError
├── SettingError            a setting or request field that cannot be used
├── BaseNotFound            no base model where one was said to be
├── UnsupportedModel        a base of a family that cannot be masked
├── MaskError               a mask or mask file that is refused
│   ├── MaskFormatError     not a mask file, truncated, or of an unknown format version
│   ├── MaskShapeError      not the shape or dtype it must have
│   ├── MaskIndexError      a neuron index out of range or given twice
│   ├── EmptyLayer          a layer that keeps nothing
│   ├── NonFiniteMask       NaN or infinity in gains, biases or attached weights
│   ├── DigestMismatch      altered after it was written
│   ├── BaseMismatch        made for another base
│   └── AttachedNotFound    names attached weights that are not here
├── PersonaNotFound, VersionNotFound, PersonaExists, NoMaskYet
├── JobNotFound, JobConflict
├── StorageFull             the disk is full
├── QueueFull, ContextTooLong, EngineStopped        raised by the engine
 ├── WeightsNotLoaded, WeightsTooLarge               raised by the engine, for `full` weights
 └── SculptCancelled, TeacherError, InsufficientMemory       raised by the pruner

`args` holds the constructor's arguments, so every error survives pickling between processes.
"""

from __future__ import annotations

import os


class MasqueradeError(Exception):
    """The root of every error that Masquerade raises on purpose."""


class SettingError(MasqueradeError):
    """A setting, flag or request field whose value cannot be used."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class BaseNotFound(MasqueradeError):
    """No base model could be loaded from what was asked for."""

    def __init__(self, spec: str, reason: str) -> None:
        super().__init__(spec, reason)
        self.spec = spec
        self.reason = reason

    def __str__(self) -> str:
        return f"no base model {self.spec!r}: {self.reason}"


class UnsupportedModel(MasqueradeError):
    """A base whose architecture cannot carry masks; the message says which can."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MaskError(MasqueradeError):
    """A mask, a mask file or a keep-index file that is refused."""


class MaskFormatError(MaskError):
    """Not a mask file at all, a truncated one, or one of an unknown format version."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MaskShapeError(MaskError):
    """A tensor whose shape or dtype does not fit the mask, or a mask that does not fit the base."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class MaskIndexError(MaskError):
    """A neuron index that is out of range or appears twice in its layer."""

    def __init__(self, message: str, layer: int | None = None) -> None:
        super().__init__(message, layer)
        self.message = message
        self.layer = layer

    def __str__(self) -> str:
        return self.message


class EmptyLayer(MaskError):
    """A layer that keeps no neuron."""

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.layer = layer

    def __str__(self) -> str:
        return f"layer {self.layer} keeps no neuron; every layer must keep at least one"


class NonFiniteMask(MaskError):
    """NaN or infinity among the gains, biases or attached weights."""

    def __init__(self, tensor: str, layer: int) -> None:
        super().__init__(tensor, layer)
        self.tensor = tensor
        self.layer = layer

    def __str__(self) -> str:
        return f"{self.tensor} of layer {self.layer} holds a value that is not finite"


class DigestMismatch(MaskError):
    """The content is not what its digest says: altered or damaged after it was written."""

    def __init__(self, expected: str, found: str, what: str = "mask") -> None:
        super().__init__(expected, found, what)
        self.expected = expected
        self.found = found
        self.what = what

    def __str__(self) -> str:
        return (
            f"the {self.what} was altered or damaged: its digest should be {self.expected}, "
            f"its content gives {self.found}"
        )


class BaseMismatch(MaskError):
    """A mask that was made for another base model."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"the mask is for another base: it names fingerprint {self.found}, this base is {self.expected}"


class AttachedNotFound(MaskError):
    """A mask that names attached weights which no version here has."""

    def __init__(self, kind: str, digest: str) -> None:
        super().__init__(kind, digest)
        self.kind = kind
        self.digest = digest

    def __str__(self) -> str:
        return f"the mask needs {self.kind} weights of digest {self.digest}, and they are not here"


class PersonaNotFound(MasqueradeError):
    """No persona of that id, or it was deleted."""

    def __init__(self, persona_id: str) -> None:
        super().__init__(persona_id)
        self.persona_id = persona_id

    def __str__(self) -> str:
        return f"there is no persona {self.persona_id!r}"


class VersionNotFound(MasqueradeError):
    """The persona has no version of that number."""

    def __init__(self, persona_id: str, version: int) -> None:
        super().__init__(persona_id, version)
        self.persona_id = persona_id
        self.version = version

    def __str__(self) -> str:
        return f"persona {self.persona_id!r} has no version {self.version}"


class PersonaExists(MasqueradeError):
    """The id is taken."""

    def __init__(self, persona_id: str) -> None:
        super().__init__(persona_id)
        self.persona_id = persona_id

    def __str__(self) -> str:
        return f"there is already a persona {self.persona_id!r}"


class NoMaskYet(MasqueradeError):
    """The persona has no published version yet: it answers from the unpruned base."""

    def __init__(self, persona_id: str) -> None:
        super().__init__(persona_id)
        self.persona_id = persona_id

    def __str__(self) -> str:
        return f"persona {self.persona_id!r} has no mask yet"


class JobNotFound(MasqueradeError):
    """No job of that id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"there is no job {self.job_id!r}"


class JobConflict(MasqueradeError):
    """What was asked for contradicts the job's or the persona's present state."""

    def __init__(self, persona_id: str, job_id: str | None, message: str) -> None:
        super().__init__(persona_id, job_id, message)
        self.persona_id = persona_id
        self.job_id = job_id
        self.message = message

    def __str__(self) -> str:
        return self.message


class StorageFull(MasqueradeError):
    """The disk, or the quota on it, is full; what was there before is untouched."""

    def __init__(self, path: str | os.PathLike[str], needed_bytes: int | None = None) -> None:
        super().__init__(os.fspath(path), needed_bytes)
        self.path = os.fspath(path)
        self.needed_bytes = needed_bytes

    def __str__(self) -> str:
        needed = "" if self.needed_bytes is None else f" ({self.needed_bytes} bytes are needed)"
        return f"no space is left to write {self.path}{needed}; nothing was changed"


class QueueFull(MasqueradeError):
    """Too many requests wait already."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the queue is full ({self.limit} requests wait); try again in {self.retry_after_s:g} s"


class ContextTooLong(MasqueradeError):
    """The prompt and what is to be generated exceed the context."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(num_tokens, limit)
        self.num_tokens = num_tokens
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens were asked for, and the context holds at most {self.limit}"


class EngineStopped(MasqueradeError):
    """The engine has stopped and takes no requests."""

    def __init__(self, reason: str = "it was closed") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the engine has stopped: {self.reason}"


class WeightsNotLoaded(MasqueradeError):
    """A persona's own FFN weights could not be loaded while its request waited."""

    def __init__(self, limit_s: float, retry_after_s: float) -> None:
        super().__init__(limit_s, retry_after_s)
        self.limit_s = limit_s
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return (
            f"the persona's own weights could not be loaded within {self.limit_s:g} s; "
            f"try again in {self.retry_after_s:g} s"
        )


class WeightsTooLarge(MasqueradeError):
    """A persona's own FFN weights exceed the memory that packs may take."""

    def __init__(self, num_bytes: int, limit: int) -> None:
        super().__init__(num_bytes, limit)
        self.num_bytes = num_bytes
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the persona's own weights take {self.num_bytes} bytes, and packs may take {self.limit} together; "
            "raise pack_cache_bytes"
        )


class SculptCancelled(MasqueradeError):
    """The sculpt was cancelled before it published anything."""

    def __init__(self, message: str = "the sculpt was cancelled") -> None:
        super().__init__(message)
        self.message = message


class TeacherError(MasqueradeError):
    """The teacher gave no usable answers."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InsufficientMemory(MasqueradeError):
    """A sculpt that the device cannot hold, refused before it starts."""

    def __init__(self, device: str, needed_bytes: int, available_bytes: int, advice: str) -> None:
        super().__init__(device, needed_bytes, available_bytes, advice)
        self.device = device
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.advice = advice

    def __str__(self) -> str:
        needed, free = self.needed_bytes / 1e9, self.available_bytes / 1e9
        where = f"this device ({self.device})"
        return f"this sculpt needs about {needed:.1f} GB, {where} has {free:.1f} GB free; {self.advice}"
