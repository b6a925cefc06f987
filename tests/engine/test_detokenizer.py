from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masquerade_engine.detokenizer import Detokenizer


def decode_bytes(token_ids: object) -> str:
    """Tokens are single bytes, so most characters take several."""
    return bytes(token_ids).decode("utf-8", errors="replace")  # type: ignore[call-overload,no-any-return]


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(decode_bytes, stop)
    deltas = []
    for token in text.encode():
        delta, stopped = detokenizer.feed(token)
        deltas.append(delta)
        if stopped:
            return deltas, True
    return [*deltas, detokenizer.flush()], False


def test_characters_come_whole() -> None:
    deltas, _ = stream("né🦊!")
    assert [delta for delta in deltas if delta] == ["n", "é", "🦊", "!"]


@given(st.text(max_size=60))
def test_the_deltas_make_the_text(text: str) -> None:
    assert "".join(stream(text)[0]) == text.rstrip("\ufffd")


def test_an_unfinished_character_is_never_sent() -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.feed(token)[0] for token in "ab🦊".encode()[:-1]]
    assert "".join(deltas) + detokenizer.flush() == "ab"


def test_bytes_that_never_make_a_character_do_not_block_what_follows() -> None:
    detokenizer = Detokenizer(decode_bytes)
    deltas = [detokenizer.feed(token)[0] for token in [97, 0x80, 0x80, 98, 99]]
    assert "".join(deltas) == "a\ufffd\ufffdbc"


def test_a_stop_string_across_tokens_is_cut_out() -> None:
    deltas, stopped = stream("Hello END of it", ("END",))
    assert "".join(deltas) == "Hello "
    assert stopped


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    detokenizer = Detokenizer(decode_bytes, ("END", "ENOUGH"))
    deltas = [detokenizer.feed(token)[0] for token in b"aENOx"]
    assert deltas == ["a", "", "", "", "ENOx"]


def test_what_was_held_back_comes_at_the_end() -> None:
    deltas, stopped = stream("so EN", ("END",))
    assert deltas[-1] == "EN"
    assert "".join(deltas) == "so EN"
    assert not stopped


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    detokenizer = Detokenizer(lambda tokens: "one two three" if tokens else "", ("three", "two"))
    assert detokenizer.feed(0) == ("one ", True)


@pytest.mark.parametrize("may_stop", [False, True])
def test_stop_strings_wait_for_the_least_number_of_tokens(may_stop: bool) -> None:
    detokenizer = Detokenizer(decode_bytes, ("a",))
    assert detokenizer.feed(97, may_stop=may_stop) == ("" if may_stop else "a", may_stop)


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_a_stream_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    sent = "".join(stream(text, tuple(stop))[0])
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert sent == text
    else:
        assert text.startswith(sent)
        assert not any(s in sent for s in stop)
        assert any(text[len(sent) :].startswith(s) for s in stop)
