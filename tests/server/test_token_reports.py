"""Logprobs beside the text: the bytes of tokens, and which tokens are told of with which piece of text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from masquerade_engine.detokenizer import Detokenizer
from masquerade_engine.requests import TokenOutput
from masquerade_server.openai_shapes import CompletionShape, ReplyHead, token_text
from masquerade_server.token_bytes import TokenBytes
from masquerade_server.token_reports import TokenReports

HEAD = ReplyHead("cmpl-1", 1, "mira", "v1-abc")


@pytest.fixture(scope="module")
def byte_level(tiny_base_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base_dir)


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Pieces that begin with their space, bytes for the rest, as in Llama 2."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "H", "i", "▁H", "▁Hi", "!"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "H"), ("▁H", "i")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("text", ["Hi Hi!", "Grüß Gott 🎭\n", "\ttabs  and\u00a0spaces", ""])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_bytes_of_its_tokens_are_those_of_the_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    bytes_of = TokenBytes(tokenizer)
    joined = b"".join(bytes_of(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert joined.removeprefix(b" ").decode() == text


def test_special_tokens_and_unknown_ids(byte_level: Any) -> None:
    bytes_of = TokenBytes(byte_level)
    assert bytes_of(byte_level.eos_token_id) == b"<|im_end|>"
    assert bytes_of(10**6) == b""
    assert token_text(b"\xf0\x9f") == "\ufffd"


# --- tokens in step with text


def replay(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[int], bool]:
    """The text and the reported tokens of a generation, checking on the way that no token is told before its text."""
    decode = lambda ids: str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    detokenizer, bytes_of = Detokenizer(decode, stop), TokenBytes(tokenizer)
    reports = TokenReports(bytes_of, frozenset({tokenizer.eos_token_id}))
    text, told = "", []
    for number, token in enumerate(tokens, 1):
        if token == tokenizer.eos_token_id:
            delta, reason = detokenizer.flush(), "stop"
        else:
            delta, stopped = detokenizer.feed(token)
            reason = "stop" if stopped else "length" if number == len(tokens) else None
            delta += detokenizer.flush() if reason == "length" else ""
        text += delta
        output = TokenOutput("r", token, delta, -0.5, (), reason, 3, 0, number)  # type: ignore[arg-type]
        told += [one.token_id for one in reports.feed(output) if one.token_id is not None]
        if reason is None:
            assert len(b"".join(map(bytes_of, told)).strip()) <= len(text.encode())
        else:
            return text, told, reason == "stop"
    raise AssertionError("the tokens have an end")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("end", ["token", "length"])
def test_every_token_of_a_whole_text_is_told(kind: str, end: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer("Hi Hi! Grüß Gott 🎭.", add_special_tokens=False)["input_ids"]
    text, told, _ = replay(tokenizer, [*tokens, tokenizer.eos_token_id] if end == "token" else tokens, ("Gotz",))
    assert text == "Hi Hi! Grüß Gott 🎭."
    assert told == tokens


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_tokens_of_a_stop_string_are_not_told(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer("Hi Hi! STOP and on", add_special_tokens=False)["input_ids"]
    text, told, stopped = replay(tokenizer, tokens, ("STOP",))
    assert stopped
    assert text == "Hi Hi! "
    assert b"".join(map(TokenBytes(tokenizer), told)).removeprefix(b" ").decode() == text


def test_any_cut_keeps_tokens_and_text_in_step(byte_level: Any) -> None:
    bytes_of, rng = TokenBytes(byte_level), random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("abé🎭 <", k=12))
        stop = "".join(rng.choices("abé🎭 <", k=rng.randint(1, 3)))
        tokens = byte_level(text + "|", add_special_tokens=False)["input_ids"]
        found, told, _ = replay(byte_level, tokens, (stop,))
        assert b"".join(map(bytes_of, told)).decode() == found
        assert found == ((text + "|").split(stop)[0])


# --- the older call


def test_completions_name_the_sampled_token_beside_the_likeliest(byte_level: Any) -> None:
    a, b, c = byte_level("abc", add_special_tokens=False)["input_ids"]
    outputs = [
        TokenOutput("r", c, "c", -3.0, ((a, -0.5), (b, -1.0)), None, 3, 0, 1),
        TokenOutput("r", a, "a", -0.5, ((a, -0.5), (b, -1.0)), "length", 3, 0, 2),
    ]
    shape = CompletionShape(HEAD, TokenBytes(byte_level))
    chunks = [shape.piece(index, output.text, [output]) for output in outputs for index in (0, 1)]
    said = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert said[0]["top_logprobs"] == [{"a": -0.5, "b": -1.0, "c": -3.0}]
    assert said[2]["top_logprobs"] == [{"a": -0.5, "b": -1.0}]
    assert [one["text_offset"] for one in said] == [[0], [0], [1], [1]]  # each choice counts for itself
    assert [one["tokens"] for one in said] == [["c"], ["c"], ["a"], ["a"]]
