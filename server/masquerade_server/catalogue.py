"""The catalogue: from what a client calls a model to the function that computes it.

It reads the registry on every request (0.1 ms), so a request sees a publish as soon as it is committed,
and caches only what never changes: the sub-network of a version.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masquerade_engine.requests import PersonaFunction
from masquerade_masks import MaskError, PersonaNotFound, SettingError, VersionNotFound
from masquerade_server.errors import ModelNotFound

if TYPE_CHECKING:
    from masquerade_engine.base import Base
    from masquerade_masks.registry.base import Registry
    from masquerade_masks.registry.records import Persona, Version
    from masquerade_masks.store import PersonaFiles

log = logging.getLogger("masquerade.catalogue")

DENSE = "dense"
MAX_FUNCTIONS = 512  # with a mask alone 6 KB each on the bundled base, 58 KB on an 8B one; with gains there 0.5 MB
MAX_COUNTED = 4096  # personas whose requests are counted; of more, the busier half
_DAMAGE_RECHECK_S = 5.0  # a file put back in place serves again within this


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed `model`: `id`, `id@3` or `id@dense`."""

    persona_id: str
    selector: int | str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What one request is served by, resolved once; a request keeps it to its last token."""

    model: str  # as the client named it
    function: PersonaFunction
    persona_id: str | None = None  # None: the base under its own name
    version: int | None = None  # None: the unpruned base
    system_prompt: str | None = None

    @property
    def fingerprint(self) -> str:
        """`v3-<digest>`, or `base-<fingerprint>` where no mask serves; 16 hex digits."""
        if self.version is None:
            return f"base-{self.function.digest.removeprefix('base:')[:16]}"
        return f"v{self.version}-{self.function.digest[:16]}"


@dataclass(frozen=True, slots=True)
class Serving:
    """How a persona is served at this moment, and what is wrong with that, in words."""

    function: PersonaFunction
    version: Version | None  # None: the unpruned base
    system_prompt: str
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class _Damage:
    reason: str
    found_at: float  # monotonic seconds


class Catalogue:
    """Resolves names for one base. Every method blocks on files or SQLite: call it in a thread."""

    def __init__(self, base: Base, registry: Registry, files: PersonaFiles) -> None:
        self._base = base
        self._registry = registry
        self._files = files
        self._lock = threading.Lock()
        self._functions: OrderedDict[tuple[str, str, str], PersonaFunction | _Damage] = OrderedDict()
        self._num_requests: Counter[str] = Counter()  # per persona, since the start

    def resolve(self, model: str | None, persona: str | None = None) -> Target:
        """The target of a request's `model` and `persona` fields.

        Raises `SettingError` where they contradict each other, and what `target` raises.
        """
        found = self.target(_combined(model, persona, self._base.name))
        if found.persona_id is not None:
            self._count(found.persona_id)
        return found

    def target(self, asked: str) -> Target:
        """What `asked` as a model would be served by. Raises `ModelNotFound`: unknown, deleted, or no such selector."""
        if asked == self._base.name:
            return Target(asked, self.base_function("default"))
        name = parse_model(asked)
        try:
            return self._persona_target(asked, name)
        except (PersonaNotFound, VersionNotFound) as error:
            raise ModelNotFound(asked, f"{error}; the base is {self._base.name!r}, GET /v1/models lists all") from error

    def serving(self, persona: Persona) -> Serving:
        """What a chat with the persona is answered by right now."""
        if persona.version is None:
            return Serving(self.base_function(persona.cast), None, persona.system_prompt)
        version = self._registry.get_version(persona.id, persona.version)
        prompt = persona.system_prompt if persona.flagged else version.system_prompt
        loaded = self._function(persona, version)
        if isinstance(loaded, _Damage):
            warning = f"version {version.number} cannot be served, so the unpruned base answers: {loaded.reason}"
            return Serving(self.base_function(persona.cast), None, prompt, warning)
        flagged = f"version {version.number} was sculpted for another text than the one it is served with"
        return Serving(loaded, version, prompt, flagged if persona.flagged else None)

    def base_function(self, cast: str) -> PersonaFunction:
        """The unpruned base in a cast's namespace."""
        return PersonaFunction(f"base:{self._base.fingerprint}", cast, None)

    def function(self, persona: Persona, version: Version) -> PersonaFunction | None:
        """A version's function; None where its mask file cannot be read."""
        loaded = self._function(persona, version)
        return None if isinstance(loaded, _Damage) else loaded

    def num_requests(self, persona_id: str) -> int:
        """Requests for a persona since the start."""
        return self._num_requests[persona_id]

    def _count(self, persona_id: str) -> None:
        with self._lock:
            self._num_requests[persona_id] += 1
            if len(self._num_requests) > MAX_COUNTED:
                self._num_requests = Counter(dict(self._num_requests.most_common(MAX_COUNTED // 2)))

    def _persona_target(self, asked: str, name: ModelName) -> Target:
        persona = self._registry.get_persona(name.persona_id)
        if isinstance(name.selector, int):
            version = self._registry.get_version(persona.id, name.selector)
            function = self.function(persona, version)
            number = version.number if function is not None else None
            return Target(
                asked,
                function or self.base_function(persona.cast),
                persona.id,
                number,
                version.system_prompt,
            )
        serving = self.serving(persona)
        if name.selector == DENSE:
            return Target(asked, self.base_function(persona.cast), persona.id, None, serving.system_prompt)
        number = serving.version.number if serving.version is not None else None
        return Target(asked, serving.function, persona.id, number, serving.system_prompt)

    def _function(self, persona: Persona, version: Version) -> PersonaFunction | _Damage:
        key = (
            persona.id,
            persona.cast,
            version.digest,
        )  # an id that was deleted and made anew has another digest
        with self._lock:
            cached = self._functions.get(key)
            if cached is not None and not _outdated(cached):
                self._functions.move_to_end(key)
                return cached
        loaded = self._load(persona, version)
        with self._lock:
            self._functions[key] = loaded
            while len(self._functions) > MAX_FUNCTIONS:
                self._functions.popitem(last=False)
        return loaded

    def _load(self, persona: Persona, version: Version) -> PersonaFunction | _Damage:
        try:
            mask_file = self._files.read_mask(
                persona.id, version.number, base=self._base.fingerprint, shape=self._base.shape
            )
        except VersionNotFound:
            reason = "its mask file is gone"
        except (MaskError, OSError) as error:
            reason = str(error)
        else:
            if mask_file.subnetwork.digest == version.digest:
                return PersonaFunction(version.digest, persona.cast, mask_file.subnetwork)
            reason = "its mask file is not the one that was published"
        log.error("persona %s, version %d is served by the unpruned base: %s", persona.id, version.number, reason)
        return _Damage(reason, time.monotonic())


def parse_model(asked: str) -> ModelName:
    """Raises `ModelNotFound` where what follows the @ is neither a version number nor `dense`."""
    persona_id, at, selector = asked.partition("@")
    if not at:
        return ModelName(persona_id)
    if selector == DENSE:
        return ModelName(persona_id, DENSE)
    if selector.isascii() and selector.isdecimal() and 1 <= int(selector[:10]) < 2**31:
        return ModelName(persona_id, int(selector[:10]))
    raise ModelNotFound(asked, f"{asked[:100]!r} is no model: after the @ comes a version number or 'dense'")


def _combined(model: str | None, persona: str | None, base: str) -> str:
    """One name out of the two fields. With `persona`, `model` may be the base's name or say the same."""
    if persona is None:
        if not model:
            raise SettingError("model", f"is required: a persona's id, or {base!r} for the base itself")
        return model
    if not persona:
        raise SettingError("persona", "must not be empty")
    if not model or model in (base, persona):
        return persona
    from_model, from_persona = parse_model(model), parse_model(persona)
    if from_model.persona_id == from_persona.persona_id and None in (
        from_model.selector,
        from_persona.selector,
    ):
        return model if from_persona.selector is None else persona
    raise SettingError("persona", f"is {persona[:100]!r}, and model is {model[:100]!r}: send one, or the same in both")


def _outdated(cached: PersonaFunction | _Damage) -> bool:
    return isinstance(cached, _Damage) and time.monotonic() - cached.found_at > _DAMAGE_RECHECK_S
