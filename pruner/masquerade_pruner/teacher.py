"""Answer: who writes the answers that a mask is learned from.

The base as its own teacher answers under the persona prompt, p(a | P, q), through the engine's batched generation with
its shared prompt prefixes. A remote teacher rewrites the neutral answer (the paper): see `rewriting`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from masquerade_engine.requests import PersonaFunction, Request, SamplingParams

if TYPE_CHECKING:
    from masquerade_engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Ask:
    """One question put to the teacher, as it will be served."""

    id: str
    prompt: tuple[int, ...]  # tokens, persona prompt and context included
    question: str
    neutral_answer: str
    seed: int
    scene: str | None = None  # a client's scene line, which `prompt` holds as well


@dataclass(frozen=True, slots=True)
class Answer:
    """The teacher's answer; `ended` tells an answer that the teacher finished from one that was cut."""

    ask_id: str
    tokens: tuple[int, ...]  # the end token is the last where the teacher ended
    text: str
    ended: bool
    unusable: str | None = None  # why it is dropped, in one word
    # Before each token, where the base itself answered: its final normed state, `[tokens, hidden]` on the CPU.
    dense_states: torch.Tensor | None = None


class Teacher(Protocol):
    """Writes in-character answers."""

    @property
    def name(self) -> str:
        """What the mask's settings call this teacher."""
        ...

    def answer(self, asks: Sequence[Ask], *, max_tokens: int) -> Generator[Answer, None, None]:
        """Yield answers as they are finished, in any order. Leaving early cancels what is running."""
        ...


class SelfTeacher:
    """The base under the persona prompt, or (for evaluation) a sub-network of it."""

    name = "base"

    def __init__(self, engine: Engine, function: PersonaFunction, *, temperature: float = 1.0) -> None:
        self._engine = engine
        self._function = function
        self._temperature = temperature  # 1: samples of p(a | P, q) itself

    def answer(self, asks: Sequence[Ask], *, max_tokens: int) -> Generator[Answer, None, None]:
        """Yield one sampled answer an ask. Leaving the iterator early cancels what is running."""
        waiting = {ask.id: ask for ask in asks}
        tokens: dict[str, list[int]] = {ask.id: [] for ask in asks}
        texts: dict[str, list[str]] = {ask.id: [] for ask in asks}
        states: dict[str, list[torch.Tensor]] = {ask.id: [] for ask in asks}
        for ask in asks:
            self._engine.add(self._request(ask, max_tokens))
        try:
            while waiting:
                for output in self._engine.step():
                    if output.token_id is not None:
                        tokens[output.request_id].append(output.token_id)
                    if output.hidden_state is not None:
                        states[output.request_id].append(output.hidden_state)
                    texts[output.request_id].append(output.text)
                    if output.finish_reason is not None:
                        done = waiting.pop(output.request_id).id
                        ended = output.finish_reason == "stop"
                        rows = states.pop(done)
                        dense = torch.stack(rows) if rows else None
                        yield Answer(done, tuple(tokens.pop(done)), "".join(texts.pop(done)), ended, dense_states=dense)
        finally:
            for ask_id in waiting:
                self._engine.cancel(ask_id)

    def _request(self, ask: Ask, max_tokens: int) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=self._temperature, seed=ask.seed)
        return Request(
            id=ask.id,
            prompt=ask.prompt,
            function=self._function,
            sampling=sampling,
            return_hidden_states=self._function.subnetwork is None,
        )
