"""A persona on the dense base and on its sub-network: forwards to score with, an engine to speak through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import torch

from masquerade_engine.base import Base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_masks import BaseMismatch, SubNetwork
from masquerade_pruner.applied import applied, refuse_unloaded
from masquerade_pruner.examples import Example
from masquerade_pruner.learner import build_learner
from masquerade_pruner.synthesis import Planned, answer
from masquerade_pruner.teacher import SelfTeacher
from masquerade_pruner.tree import Forward, masked

STREAMS = 64  # answers spoken at once, as in a sculpt


class PersonaPair:
    """Both models of one persona; a context manager. Raises `BaseMismatch`, and `SettingError` as `applied` does."""

    def __init__(self, base: Base, subnetwork: SubNetwork, system_prompt: str) -> None:
        if subnetwork.base != base.fingerprint:
            raise BaseMismatch(base.fingerprint, subnetwork.base)
        refuse_unloaded(subnetwork)
        self.base = base
        self.subnetwork = subnetwork
        self.system_prompt = system_prompt

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "engine" in self.__dict__:
            self.engine.close()

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base with plain linears, which forwards run through."""
        return build_learner(self.base)

    @cached_property
    def engine(self) -> Engine:
        """Opened when the first answer is asked for."""
        return Engine(self.base, EngineSettings(max_num_seqs=STREAMS, max_queue=1_000_000))

    @property
    def dense(self) -> Forward:
        """The base as it is."""
        return masked(self.model)

    @cached_property
    def sculpted(self) -> Forward:
        """The base under the sub-network."""
        return applied(self.model, self.subnetwork)

    def teacher(self, *, sculpted: bool) -> SelfTeacher:
        """Whoever answers, by sampling at temperature 1."""
        subnetwork = self.subnetwork if sculpted else None
        digest = self.subnetwork.digest if sculpted else f"base:{self.base.fingerprint}"
        return SelfTeacher(self.engine, PersonaFunction(digest, "evaluate", subnetwork))

    def speak(
        self,
        planned: Sequence[Planned],
        *,
        sculpted: bool = False,
        max_tokens: int,
        system_prompt: str | None = None,  # another persona's, instead of this one's
        on_example: Callable[[Example], None] = lambda example: None,
    ) -> list[Example]:
        """One answer each, in the order of the plan; one that came out empty is left out."""
        given = answer(
            planned,
            base=self.base,
            system_prompt=self.system_prompt if system_prompt is None else system_prompt,
            teacher=self.teacher(sculpted=sculpted),
            max_tokens=max_tokens,
            on_example=on_example,
        )
        by_id = {one.id: one for one in given}
        return [by_id[one.id] for one in planned if one.id in by_id]
