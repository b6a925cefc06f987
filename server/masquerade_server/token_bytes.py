"""The bytes that each token stands for: what logprobs report, and where a token lies in the text."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # sentencepiece's byte fallback
_SPACE = "\u2581"  # sentencepiece's


class TokenBytes:
    """Bytes by token id. Special tokens have those of their names, though a reply's text leaves them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokenizer = tokenizer
        self._added: dict[int, bytes] = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._decoders = _decoders(tokenizer)

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # rows that pad the vocabulary
            return b""
        if "ByteLevel" in self._decoders and _BYTE_OF.keys() >= set(piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        if _SPACE in piece:
            return str(piece.replace(_SPACE, " ")).encode()
        return str(self._tokenizer.decode([token_id])).encode()


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """A tokenizer's, made once."""
    return TokenBytes(tokenizer)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The kinds of decoders that a fast tokenizer chains; empty for another."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.decoder is None:
        return frozenset()
    decoder: dict[str, Any] = json.loads(fast.decoder.__getstate__())
    return frozenset(one["type"] for one in (decoder, *decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
