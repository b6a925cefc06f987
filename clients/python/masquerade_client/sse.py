"""An incremental parser for server-sent events, as the HTML standard defines the format.

It takes bytes as they arrive, cut anywhere: inside a line, a CRLF or a UTF-8 sequence.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One dispatched event. `id` is the last id seen on this stream, which is what a reconnect sends back."""

    data: str
    type: str = "message"
    id: str | None = None


class EventParser:
    """Feed bytes, get the events they complete. An event with no blank line after it is never dispatched."""

    def __init__(self, last_event_id: str | None = None) -> None:
        self.last_event_id = last_event_id  # of the last event that was whole: where a reconnect goes on
        self.retry_ms: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line: list[str] = []  # pieces of the line that has not ended yet
        self._after_cr = False  # the last character was CR: an LF that follows belongs to it
        self._at_start = True
        self._data: list[str] = []
        self._type = ""
        self._id = last_event_id  # of the event that has not ended yet

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events completed by `chunk`, in order."""
        events = []
        for line in self._lines(self._decoder.decode(chunk)):
            if line:
                self._field(line)
            elif (event := self._dispatch()) is not None:
                events.append(event)
        return events

    def _lines(self, text: str) -> list[str]:
        if not text:
            return []
        if self._at_start:
            text, self._at_start = text.removeprefix("\ufeff"), False
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        *ended, rest = _LINE_END.split(text)
        if ended:
            ended[0] = "".join([*self._line, ended[0]])
            self._line = []
        if rest:
            self._line.append(rest)
        return ended

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._type = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
            case _:  # a comment (empty name) or a field of a later standard
                pass

    def _dispatch(self) -> ServerSentEvent | None:
        data, kind = self._data, self._type or "message"
        self._data, self._type = [], ""
        self.last_event_id = self._id
        if not data:
            return None
        return ServerSentEvent("\n".join(data), kind, self.last_event_id)
