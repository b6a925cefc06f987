"""Tokens to text as they come: whole characters only, nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"  # what a decoder gives for the bytes of a character whose rest has not come
# Tokens decoded anew with every token; the tail of a window is the next one's context, since sentencepiece
# decoders strip the space of the first token they see.
_WINDOW = 16
_CONTEXT = 4


class Detokenizer:
    """The text of one generation. `decode` turns token ids to text and drops special tokens."""

    def __init__(self, decode: Decode, stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_sent = 0  # characters of the window's text that have left it
        self._stops = _StopStrings(stop)

    def feed(self, token_id: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is safe to send now, and whether a stop string has ended the generation."""
        self._window.append(token_id)
        stable = self._decode(self._window).rstrip(_UNFINISHED)
        delta = stable[self._num_sent :]
        self._num_sent = max(self._num_sent, len(stable))
        if len(self._window) >= _WINDOW:
            self._shift(stable)
        return self._stops.feed(delta, may_stop)

    def flush(self) -> str:
        """What was held back for a stop string that did not come. An unfinished character is dropped."""
        return self._stops.flush()

    def _shift(self, stable: str) -> None:
        """Forget all but the window's tail, where that is the same text."""
        tail = self._window[-_CONTEXT:]
        text = self._decode(tail).rstrip(_UNFINISHED)
        if text and stable.endswith(text):
            self._window = tail
            self._num_sent = len(text)


class _StopStrings:
    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def feed(self, delta: str, may_stop: bool) -> tuple[str, bool]:
        text = self._held + delta
        self._held = ""
        if not self._stop or not may_stop:
            return text, False
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        held = max(_overlap(text, stop) for stop in self._stop)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
