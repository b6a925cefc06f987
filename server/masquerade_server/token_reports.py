"""Which tokens a client is told of with which piece of text, where it asked for logprobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masquerade_engine.requests import TokenOutput
    from masquerade_server.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True)
class _Held:
    output: TokenOutput
    start: int  # in bytes of the text
    stop: int


class TokenReports:
    """Keeps the tokens of one choice in step with its text.

    A token whose text is held back, since it may begin a stop string, is held back with it, and dropped where it did.
    End tokens are part of neither.
    """

    def __init__(self, bytes_of: TokenBytes, stop_ids: frozenset[int]) -> None:
        self._bytes_of = bytes_of
        self._stop_ids = stop_ids
        self._held: list[_Held] = []
        self._num_bytes = 0  # of the tokens that have come
        self._num_sent = 0  # of the text that has

    def feed(self, output: TokenOutput) -> list[TokenOutput]:
        """The tokens that go with the output's text."""
        is_end_token = output.token_id in self._stop_ids
        if output.logprob is not None and not is_end_token:
            self._hold(output)
        if output.text:
            self._num_sent += len(output.text.encode()) + self._num_stripped(output.text)
        if output.finish_reason is None:
            told = [one for one in self._held if one.stop <= self._num_sent]
        elif output.finish_reason == "stop" and not is_end_token:  # a stop string: the text ends before it
            told = [one for one in self._held if one.start < self._num_sent]
        else:
            told = self._held
        self._held = self._held[len(told) :]
        return [one.output for one in told]

    def _hold(self, output: TokenOutput) -> None:
        assert output.token_id is not None
        skipped = output.token_id in self._bytes_of.special_ids  # the text leaves it out
        stop = self._num_bytes + (0 if skipped else len(self._bytes_of(output.token_id)))
        self._held.append(_Held(output, self._num_bytes, stop))
        self._num_bytes = stop

    def _num_stripped(self, text: str) -> int:
        """1 where the first piece of text lacks the space that its token begins with, as sentencepiece has it."""
        if self._num_sent or not self._held:
            return 0
        first = self._held[0].output.token_id
        return int(first is not None and self._bytes_of(first)[:1] == b" " and not text.startswith(" "))
