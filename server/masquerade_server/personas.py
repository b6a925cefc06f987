"""What the `/personas` calls do, without HTTP. Every method blocks on SQLite or files: use a thread."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masquerade_engine.prompt import persona_system_prompt, prompt_sha256
from masquerade_masks import (
    JobConflict,
    JobNotFound,
    Mask,
    MaskError,
    MaskFormatError,
    NoMaskYet,
    PersonaExists,
    PersonaNotFound,
    SettingError,
    VersionNotFound,
    attached_file,
)
from masquerade_masks.mask_file import MaskFile, decode
from masquerade_masks.registry import Job, Persona, Version
from masquerade_server.errors import DamagedFile, NothingAttached
from masquerade_server.identifiers import id_from_name
from masquerade_server.overlap import overlap_json
from masquerade_server.publishing import Publication, publish
from masquerade_server.schemas import PersonaBody
from masquerade_server.sse import encode_json
from masquerade_server.views import PersonaFacts

if TYPE_CHECKING:
    from masquerade_masks.registry import Registry
    from masquerade_masks.store import PersonaFiles
    from masquerade_server.catalogue import Serving
    from masquerade_server.schemas import PersonaPatch
    from masquerade_server.state import Backend

Json = dict[str, Any]

_PROMPT_SHARE = 0.75  # of the context that a persona's prompt may take; the rest is for the conversation
_SPEC_FIELDS = ("name", "text", "sparsity", "recovery", "teacher", "preset", "seed")
_PAGE = 200
_MAX_KEY_CHARS = 255


class PersonaDesk:
    """Creates, changes and describes the personas of one base."""

    def __init__(
        self, backend: Backend, registry: Registry, files: PersonaFiles, *, remote_teacher: bool = False
    ) -> None:
        self._base = backend.base
        self._engine = backend.engine
        self._catalogue = backend.catalogue
        self._registry = registry
        self._files = files
        self._remote_teacher = remote_teacher  # whether the operator has configured one

    # --- create, change, delete

    def create(self, body: PersonaBody, idempotency_key: str | None = None) -> tuple[Persona, Job | None]:
        """A new persona and its first job; what the same key created before, as it is now.

        Raises `PersonaExists` for an id that is taken; `SettingError` for a reserved id, a teacher that is
        not configured, a prompt that leaves no room to chat, or a key that came with another body.
        """
        _check_key(idempotency_key)
        self._check_teacher(body.teacher)
        prompt = self._checked_prompt(body.name, body.text)
        digest = hashlib.sha256(encode_json(body.model_dump(mode="json")).encode()).hexdigest()
        for persona_id in self._ids(body):
            persona = self._new_persona(persona_id, body, prompt)
            job = _new_job(persona) if body.sculpt else None
            try:
                stored, stored_job, _ = self._registry.create_persona(persona, job, idempotency_key, digest)
            except PersonaExists:
                if body.id is not None:
                    raise
            else:
                return stored, stored_job
        raise AssertionError("ids made from a name never end")

    def check(self, body: PersonaBody) -> None:
        """Raises what `create` raises for this body, ids in use aside."""
        next(self._ids(body))
        self._check_teacher(body.teacher)
        self._checked_prompt(body.name, body.text)

    def body_after(self, persona_id: str, patch: PersonaPatch) -> PersonaBody:
        """What would create the persona as the patch leaves it. Raises `PersonaNotFound`."""
        persona = self._registry.get_persona(persona_id)
        fields = {name: getattr(persona, name) for name in _SPEC_FIELDS}
        return PersonaBody(**fields | patch.model_dump(exclude_none=True, exclude={"sculpt"}))

    def update(self, persona_id: str, patch: PersonaPatch) -> tuple[Persona, Job | None]:
        """Change a persona; the job is the one that sculpts the new version, None where the mask is kept.

        While a version serves, a new text takes effect with the version sculpted for it; with `sculpt:
        false` it does so at once, and the persona is flagged. Raises `PersonaNotFound`, `JobConflict`,
        `SettingError`.
        """
        persona = self._registry.get_persona(persona_id)
        given = patch.model_dump(exclude_none=True, exclude={"sculpt"})
        wanted = replace(persona, **given)
        wanted = replace(wanted, system_prompt=self._checked_prompt(wanted.name, wanted.text))
        changed = {name for name in (*_SPEC_FIELDS, "system_prompt") if getattr(wanted, name) != getattr(persona, name)}
        sculpt = bool(changed) if patch.sculpt is None else patch.sculpt
        if sculpt or patch.teacher is not None:
            self._check_teacher(wanted.teacher)
        if sculpt:
            job = self._registry.create_job(_new_job(wanted))
            if persona.version is not None:
                changed -= {"text", "system_prompt"}
            return self._store(wanted, changed), job
        if "system_prompt" in changed:
            self._refuse_while_sculpting(persona_id)
            wanted = replace(wanted, flagged=self._differs_from_mask(wanted))
            changed.add("flagged")
        return self._store(wanted, changed), None

    def rollback(self, persona_id: str, number: int | None) -> Persona:
        """Serve version `number`, or the one before the present. Raises `VersionNotFound`, `NoMaskYet`."""
        if number is None:
            present = self.version(persona_id, None).number
            earlier = [one.number for one in self._registry.list_versions(persona_id) if one.number < present]
            if not earlier:
                raise VersionNotFound(persona_id, present - 1)
            number = earlier[-1]
        persona = self._registry.set_serving(persona_id, number)
        return self._registry.update_persona(persona_id, flagged=True) if self._differs_from_mask(persona) else persona

    def delete(self, persona_id: str) -> None:
        """Gone, with its job, files and what the engine holds of it; requests in flight finish.

        Raises `PersonaNotFound`.
        """
        versions = self._registry.list_versions(persona_id)
        self._registry.delete_persona(persona_id)
        self._files.remove(persona_id)
        for version in versions:
            self._engine.forget(version.digest)

    def cancel(self, persona_id: str) -> Job:
        """Stop the sculpt. Raises `JobConflict` where there is none to stop."""
        self._registry.get_persona(persona_id)
        job = self._registry.latest_job(persona_id)
        if job is None or job.is_final:
            raise JobConflict(persona_id, job.id if job else None, f"persona {persona_id!r} is not being sculpted")
        return self._registry.request_cancel(job.id)

    def install_mask(self, persona_id: str, data: bytes) -> Persona:
        """Publish an uploaded mask file as the next version and serve it.

        A mask learned under another text than the persona's is served and flagged. One that names attached weights
        takes those of any version here.
        Raises `MaskError` (`AttachedNotFound` among them), `PersonaNotFound`, `JobConflict`, `StorageFull`.
        """
        persona = self._registry.get_persona(persona_id)
        uploaded = self._with_weights(decode(data, base=self._base.fingerprint, shape=self._base.shape))
        self._refuse_while_sculpting(persona_id)
        publication = Publication(persona_id, persona.text, persona.system_prompt, uploaded, "upload")
        publish(self._registry, self._files, publication)
        if uploaded.header.prompt_sha256 != prompt_sha256(persona.system_prompt):
            return self._registry.update_persona(persona_id, flagged=True)
        return self._registry.get_persona(persona_id)

    # --- describe

    def facts(self, persona_id: str, *, with_report: bool = False) -> PersonaFacts:
        """Everything about one persona. Raises `PersonaNotFound`, or `JobNotFound` where it is deleted meanwhile."""
        # The job first: one that has succeeded has published, so nobody sees it without its version.
        job = self._registry.latest_job(persona_id)
        persona = self._registry.get_persona(persona_id)
        serving = self._catalogue.serving(persona)
        return PersonaFacts(
            persona=persona,
            serving=serving,
            versions=self._registry.list_versions(persona_id),
            job=job,
            queue_position=0 if job is None else self._registry.queue_position(job.id),
            residency=self._residency(serving),
            report=self.report(serving.version) if with_report and serving.version is not None else None,
        )

    def page(self, limit: int, after: str | None, cast: str | None) -> tuple[list[PersonaFacts], str | None]:
        """Up to `limit` personas by id, and the cursor of the next page where there is one."""
        found = [persona.id for persona in self._registry.list_personas(limit + 1, after, cast)]
        described = []
        for persona_id in found[:limit]:
            with suppress(PersonaNotFound, JobNotFound):  # deleted meanwhile
                described.append(self.facts(persona_id))
        return described, found[limit - 1] if len(found) > limit else None

    def every(self, cast: str | None = None) -> Iterator[Persona]:
        """All personas, by id."""
        after: str | None = None
        while page := self._registry.list_personas(_PAGE, after, cast):
            yield from page
            after = page[-1].id

    def queue_length(self) -> int:
        """Jobs that a new one would wait for."""
        latest = (self._registry.latest_job(persona.id) for persona in self.every())
        return sum(1 for job in latest if job is not None and not job.is_final)

    def version(self, persona_id: str, number: int | None) -> Version:
        """A version, the serving one by default. Raises `NoMaskYet`, `VersionNotFound`."""
        number = self._registry.get_persona(persona_id).version if number is None else number
        if number is None:
            raise NoMaskYet(persona_id)
        return self._registry.get_version(persona_id, number)

    def mask_bytes(self, version: Version) -> bytes:
        """A version's mask file as it was published. Raises `DamagedFile`."""
        try:
            data = self._files.mask_path(version.persona_id, version.number).read_bytes()
            if decode(data).subnetwork.digest == version.digest:
                return data
        except (MaskError, VersionNotFound, OSError) as error:
            raise DamagedFile(version.persona_id, version.number, "mask") from error
        raise DamagedFile(version.persona_id, version.number, "mask")

    def attached_path(self, version: Version) -> Path:
        """The file of a version's attached weights, as it was published. Raises `NothingAttached`, `DamagedFile`."""
        if not version.attached:
            raise NothingAttached(version.persona_id, version.number)
        try:
            path = self._files.attached_path(version.persona_id, version.number, version.attached)
            if attached_file.read(path).digest == version.attached:
                return path
        except (MaskError, VersionNotFound, OSError) as error:
            raise DamagedFile(version.persona_id, version.number, "attached weights'") from error
        raise DamagedFile(version.persona_id, version.number, "attached weights'")

    def report(self, version: Version) -> Json | None:
        """A version's fidelity report; None for one that was uploaded. Raises `DamagedFile`."""
        try:
            return self._files.read_report(version.persona_id, version.number)
        except VersionNotFound:
            return None
        except (OSError, ValueError) as error:
            raise DamagedFile(version.persona_id, version.number, "report") from error

    def examples(self, version: Version, offset: int, limit: int) -> list[Json]:
        """Rows `offset` to `offset + limit` of a version's examples; none for one that was uploaded."""
        try:
            path = self._files.examples_path(version.persona_id, version.number)
        except VersionNotFound:
            return []
        try:
            with path.open(encoding="utf-8") as lines:
                return [_example_json(json.loads(line)) for line in islice(lines, offset, offset + limit)]
        except (OSError, ValueError) as error:
            raise DamagedFile(version.persona_id, version.number, "examples") from error

    def overlap(self, cast: str, limit: int) -> Json:
        """Overlap of the masks that serve in a cast, the `limit` busiest first."""
        personas = sorted(self.every(cast), key=lambda one: (-self._catalogue.num_requests(one.id), one.id))
        masks: dict[str, Mask] = {}
        for persona in personas:
            subnetwork = self._catalogue.serving(persona).function.subnetwork
            if subnetwork is not None and len(masks) < limit:
                masks[persona.id] = subnetwork.mask
        return overlap_json(cast, masks)

    # --- pieces

    def _with_weights(self, uploaded: MaskFile) -> MaskFile:
        """The mask with the attached weights that it names. Raises `MaskError`."""
        attached, recovery = uploaded.subnetwork.attached, uploaded.header.recovery
        if len(attached) > 1 or recovery not in ([attached[0][0]] if attached else ["none", "vectors"]):
            names = ", ".join(name for name, _ in attached) or "none"
            raise MaskFormatError(f"the mask says recovery {recovery[:40]!r}, and its attached weights are {names}")
        if not attached:
            return uploaded
        weights = self._files.find_attached(*attached[0])
        return replace(uploaded, subnetwork=replace(uploaded.subnetwork, weights=weights))

    def _residency(self, serving: Serving) -> str:
        """Of the pack that serves; the base's own is always there."""
        return "dense" if serving.version is None else self._engine.residency(serving.function.digest)

    def _ids(self, body: PersonaBody) -> Iterator[str]:
        """The id that was asked for, or one after another made from the name. Raises `SettingError`."""
        if body.id is not None:
            if body.id == self._base.name:
                raise SettingError("id", f"{body.id!r} is the name of the base; choose another")
            yield body.id
            return
        slug = id_from_name(body.name) or f"persona-{uuid.uuid4().hex[:8]}"
        for number in count(1):
            candidate = slug if number == 1 else f"{slug[:55]}-{number}"
            if candidate != self._base.name:
                yield candidate

    def _new_persona(self, persona_id: str, body: PersonaBody, prompt: str) -> Persona:
        return Persona(
            id=persona_id,
            name=body.name,
            text=body.text,
            system_prompt=prompt,
            cast=body.cast,
            sparsity=body.sparsity,
            recovery=body.recovery,
            preset=body.preset,
            teacher=body.teacher,
            base=self._base.fingerprint,
            seed=body.seed,
        )

    def _check_teacher(self, teacher: str) -> None:
        if teacher == "remote" and not self._remote_teacher:
            raise SettingError(
                "teacher",
                "'remote' is not configured on this server; its operator would set teacher_url and teacher_model. "
                "Use 'base'",
            )

    def _checked_prompt(self, name: str, text: str) -> str:
        prompt = persona_system_prompt(name, text)
        limit = int(self._engine.max_model_len * _PROMPT_SHARE)
        num_tokens = len(self._base.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if num_tokens > limit:
            raise SettingError(
                "text",
                f"makes a prompt of {num_tokens} tokens; at most {limit} of the context's "
                f"{self._engine.max_model_len} may go to it, so that a conversation fits as well",
            )
        return prompt

    def _store(self, wanted: Persona, names: set[str]) -> Persona:
        if not names:
            return self._registry.get_persona(wanted.id)
        return self._registry.update_persona(wanted.id, **{name: getattr(wanted, name) for name in names})

    def _differs_from_mask(self, wanted: Persona) -> bool:
        if wanted.version is None:
            return False
        learned = self._registry.get_version(wanted.id, wanted.version).prompt_sha256
        return learned != prompt_sha256(wanted.system_prompt)

    def _refuse_while_sculpting(self, persona_id: str) -> None:
        job = self._registry.latest_job(persona_id)
        if job is not None and not job.is_final:
            message = f"persona {persona_id!r} is being sculpted, which would replace this; cancel it first"
            raise JobConflict(persona_id, job.id, message)


def _check_key(key: str | None) -> None:
    if key is not None and not (0 < len(key) <= _MAX_KEY_CHARS):
        raise SettingError("Idempotency-Key", f"must be 1 to {_MAX_KEY_CHARS} characters long")


def _new_job(persona: Persona) -> Job:
    spec = {name: getattr(persona, name) for name in _SPEC_FIELDS}
    return Job(id=f"job-{uuid.uuid4().hex}", persona_id=persona.id, spec=spec)


def _example_json(row: Json) -> Json:
    """A row of the pruner's examples without its tokens."""
    names = ("question_id", "topic", "split", "question", "sensitivity", "scene", "num_earlier_turns")
    return {"answer": row.get("answer_text", row.get("answer"))} | {name: row[name] for name in names if name in row}
