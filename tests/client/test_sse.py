"""The event-stream parser, against the HTML standard's rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masquerade_client.sse import EventParser, ServerSentEvent

STREAM = (
    "\ufeff: a comment\r\n"
    'id: 1\nevent: stage\ndata: {"stage": "select"}\n\n'
    "data: two\rdata:  lines\r\r"
    "retry: 250\r\nid: 3\r\ndata: grüße 🎭\r\n\r\n"
    "data\n\n"
    "unknown: field\ndata:x:y\n\n"
    "data: never ended"
).encode()
EVENTS = [
    ServerSentEvent('{"stage": "select"}', "stage", "1"),
    ServerSentEvent("two\n lines", "message", "1"),
    ServerSentEvent("grüße 🎭", "message", "3"),
    ServerSentEvent("", "message", "3"),
    ServerSentEvent("x:y", "message", "3"),
]


def parse(*chunks: bytes) -> list[ServerSentEvent]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_whole_stream() -> None:
    assert parse(STREAM) == EVENTS


def test_byte_by_byte() -> None:
    assert parse(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_cut_anywhere(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert parse(*(STREAM[a:b] for a, b in pairwise(edges))) == EVENTS


def test_crlf_split_between_chunks_ends_one_line() -> None:
    assert parse(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [ServerSentEvent("a\nb")]


def test_an_event_is_dispatched_as_soon_as_its_blank_line_is_there() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\r") == [ServerSentEvent("a")]
    assert parser.feed(b"\n\n\n") == []


@pytest.mark.parametrize("line", [b"id: with\0null", b"retry: soon", b":comment", b"", b"datum: x"])
def test_lines_that_change_nothing(line: bytes) -> None:
    parser = EventParser("7")
    assert parser.feed(line + b"\n\ndata: a\n\n") == [ServerSentEvent("a", "message", "7")]
    assert parser.retry_ms is None


def test_retry_and_last_event_id_are_kept() -> None:
    parser = EventParser()
    parser.feed(b"retry: 1500\nid: 12\n\n")  # no data, so no event, and yet the id counts
    assert (parser.retry_ms, parser.last_event_id) == (1500, "12")
    parser.feed(b"id\n\n")
    assert parser.last_event_id == ""


def test_an_event_that_was_cut_off_does_not_count_as_seen() -> None:
    parser = EventParser("4")
    parser.feed(b"id: 5\ndata: a\n\nid: 6\ndata: {")
    assert parser.last_event_id == "5"


def test_other_separators_do_not_end_a_line() -> None:
    text = "data: a\u2028b\x85c\x0bd\n\n"
    assert parse(text.encode()) == [ServerSentEvent("a\u2028b\x85c\x0bd")]


def test_damaged_utf8_is_replaced() -> None:
    assert parse(b"data: \xff\n\n") == [ServerSentEvent("\ufffd")]
