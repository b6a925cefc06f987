"""The prompt contract: the exact tokens that precede and frame every chat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masquerade_engine.control_tokens import control_tokens
from masquerade_masks import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCENE_ROLES = frozenset({"system", "developer"})
_OPENINGS = ("Hello.", "Why?")  # two user turns that begin differently


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str  # system, developer, user, assistant, or what else the base's template knows
    content: str


def persona_system_prompt(name: str, text: str) -> str:
    """The system prompt of a persona: what its mask is learned under and served with."""
    return (
        f"You are {name.strip()}. {text.strip()}\n\n"
        f"Stay in character. Answer every message as {name.strip()} would, in your own voice."
    )


def prompt_sha256(system_prompt: str) -> str:
    """Lower-case hex sha256 of a persona's system prompt; a mask's metadata holds it."""
    return hashlib.sha256(system_prompt.encode("utf-8")).hexdigest()


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a chat through the base's own template.

    A persona's prompt comes first, and the client's system and developer messages join the same system turn in order.
    With `system_prompt=None` (the base under its own name) the messages are rendered as they are.
    Special tokens typed in a message are plain text: only the template's own are control tokens.
    Raises `SettingError` where the template refuses the messages, or the base has no template.
    """
    turns = list(messages) if system_prompt is None else with_persona(system_prompt, messages)
    if not tokenizer.chat_template:
        raise SettingError("messages", "this base has no chat template, so it cannot chat; use /v1/completions")
    try:
        return _rendered(tokenizer, turns, add_generation_prompt)
    except Exception as refusal:
        if not _is_template_error(refusal):
            raise
        return _rendered_without_system(tokenizer, turns, add_generation_prompt, refusal)


def shared_prefix(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> list[int]:
    """The tokens that every chat under a system prompt begins with: what can be computed before one begins.

    A chat with a scene leaves them where the prompt ends, a few tokens earlier. Raises what `render_chat` raises.
    """
    one, other = (render_chat(tokenizer, system_prompt, [ChatMessage("user", text)]) for text in _OPENINGS)
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def with_persona(system_prompt: str, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The turns that a template sees: one system turn (persona, then scene), then the rest as given."""
    scene = [message.content for message in messages if message.role in SCENE_ROLES]
    later = [message for message in messages if message.role not in SCENE_ROLES]
    return [ChatMessage("system", "\n\n".join([system_prompt, *scene])), *later]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[ChatMessage], add_generation_prompt: bool
) -> list[int]:
    control = control_tokens(tokenizer)
    typed = any(control.in_text(turn.content) for turn in turns)
    rendered: str = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": control.hidden(turn.content) if typed else turn.content} for turn in turns],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return control.encode(rendered) if typed else list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _rendered_without_system(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[ChatMessage],
    add_generation_prompt: bool,
    refusal: Exception,
) -> list[int]:
    """For templates that know no system turn (early Mistral): its text opens the first user turn."""
    if len(turns) > 1 and turns[0].role == "system" and turns[1].role == "user":
        opening = ChatMessage("user", f"{turns[0].content}\n\n{turns[1].content}")
        try:
            return _rendered(tokenizer, [opening, *turns[2:]], add_generation_prompt)
        except Exception as second_refusal:
            if not _is_template_error(second_refusal):
                raise
    raise SettingError("messages", f"the base's chat template refused them: {refusal}") from refusal


def _is_template_error(error: Exception) -> bool:
    from jinja2 import TemplateError  # noqa: PLC0415  (transformers imports it late as well)

    return isinstance(error, TemplateError)
