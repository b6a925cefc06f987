"""Which special tokens of a rendered chat are the template's own, and which are characters that someone typed.

A template writes `<|im_end|>` to end a turn, and the tokenizer makes one control token of it. The same characters in a
message would end the turn as well, and a player could forge the next. So they are kept apart: see `ControlTokens`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from masquerade_masks import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """The special tokens of one tokenizer.

    What is typed is hidden from the template (`hidden`). In what the template made of it, the special tokens that are
    left are its own: they are renamed to what nobody can guess, the typed ones are put back, and a twin of the
    tokenizer that knows the new names alone makes the tokens (`encode`). Nothing is tokenised apart from its
    neighbours, so what holds no special token is tokenised as ever. The two private characters and the number that the
    names are made of survive trimming and any normalisation.

    Where a template marks its turns with ordinary text (Llama 2, the first Mistral), there is nothing to tell apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        self._tokenizer = tokenizer
        self._contents = sorted({token.content for token in added if token.special}, key=len, reverse=True)
        self._index = {content: index for index, content in enumerate(self._contents)}
        # Longest first, as the tokenizer itself matches; without special tokens, a pattern that matches nowhere.
        self._special = re.compile("|".join(map(re.escape, self._contents)) or r"(?!)")
        self._nonce = secrets.randbelow(10**18)
        self._hidden = re.compile(f"\ue000{self._nonce}:(\\d+)\ue001")

    def in_text(self, text: str) -> bool:
        """Whether the text would give a control token."""
        return self._special.search(text) is not None

    def hidden(self, text: str) -> str:
        """The text with every special token in it hidden."""
        return self._special.sub(lambda found: f"\ue000{self._nonce}:{self._index[found[0]]}\ue001", text)

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat whose messages were `hidden`.

        Raises `SettingError` for a tokenizer that reads a special token's characters as that token in any case.
        """
        twin = self._twin
        renamed = self._special.sub(lambda found: self._name(found[0]), rendered)
        text = self._hidden.sub(lambda found: self._contents[int(found[1])], renamed)
        token_ids = twin.tokenizer.encode(text, add_special_tokens=False).ids
        if not twin.refused_ids.isdisjoint(token_ids):
            raise _unreadable(self._special.search(text))
        return [twin.true_ids.get(token_id, token_id) for token_id in token_ids]

    def _name(self, content: str) -> str:
        return f"\ue002{self._nonce}:{self._index[content]}\ue003"

    @cached_property
    def _twin(self) -> _Twin:
        from tokenizers import Tokenizer  # noqa: PLC0415

        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise _unreadable(None)
        pipeline = json.loads(fast.to_str())
        pipeline |= {"truncation": None, "padding": None, "post_processor": None}
        true_id: dict[str, int] = {}
        for token in pipeline["added_tokens"]:
            if token["content"] in self._index:
                token["content"] = self._name(token["content"])
            true_id[token["content"]] = token["id"]
        twin = Tokenizer.from_str(json.dumps(pipeline))
        true_ids = {twin.token_to_id(content): token_id for content, token_id in true_id.items()}
        special_ids = {fast.token_to_id(content) for content in self._contents}
        return _Twin(twin, true_ids, frozenset(special_ids - true_ids.keys() - {_unknown_id(pipeline["model"], fast)}))


@dataclass(frozen=True, slots=True)
class _Twin:
    """A tokenizer that knows its special tokens by other names."""

    tokenizer: Any  # tokenizers.Tokenizer
    true_ids: Mapping[int | None, int]  # of added tokens, by the twin's
    refused_ids: frozenset[int]  # of special tokens: given only where the model itself makes one out of characters


@lru_cache(maxsize=4)  # a process serves one base; the tests, a few
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """The tokenizer's special tokens, found once."""
    return ControlTokens(tokenizer)


def _unknown_id(model: dict[str, Any], fast: Any) -> int | None:
    """The token that stands for unknown characters, which are text."""
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else fast.token_to_id(name)


def _unreadable(found: re.Match[str] | None) -> SettingError:
    what = "a control token of this base" if found is None else f"{found[0]!r}, a control token of this base"
    return SettingError("messages", f"hold {what}, which its tokenizer cannot read as plain text")
