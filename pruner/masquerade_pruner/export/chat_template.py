"""A base's chat template with a persona in it: a chat that brings no system prompt is in character all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from masquerade_engine.control_tokens import control_tokens
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_masks import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What precedes the base's template. A client's system message is scene context after the persona, as it is when served;
# one that begins with the persona's own prompt stands as it is.
_SYSTEM_TURN = """\
{%- set persona = PERSONA -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set scene = messages[0]['content'] -%}
{%- set messages = messages[1:] -%}
{%- else -%}
{%- set scene = '' -%}
{%- endif -%}
{%- if not scene.startswith(persona) -%}
{%- set scene = (persona ~ '\\n\\n' ~ scene) if scene else persona -%}
{%- endif -%}
{%- set messages = [{'role': 'system', 'content': scene}] + messages -%}
"""
_FIRST_USER_TURN = """\
{%- set persona = PERSONA -%}
{%- if messages[0]['role'] == 'user' and not messages[0]['content'].startswith(persona) -%}
{%- set messages = [{'role': 'user', 'content': persona ~ '\\n\\n' ~ messages[0]['content']}] + messages[1:] -%}
{%- endif -%}
"""

_CHAT = [ChatMessage("user", "Who are you?"), ChatMessage("assistant", "Guess."), ChatMessage("user", "A ghost?")]
_SCENE = [ChatMessage("system", "It rains."), *_CHAT]


def template_in_character(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> str | None:
    """The template that renders a chat without a system prompt as `render_chat` renders it with this one.

    Both ways of saying so are tried on probe chats, token for token. None where neither holds: no template, one that
    treats its first turn in a way of its own, or a prompt that spells a control token.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or control_tokens(tokenizer).in_text(system_prompt):
        return None
    for prelude, probes in ((_SYSTEM_TURN, [_CHAT[:1], _CHAT, _SCENE]), (_FIRST_USER_TURN, [_CHAT[:1], _CHAT])):
        candidate = prelude.replace("PERSONA", _string(system_prompt)) + template
        if all(_agree(tokenizer, candidate, system_prompt, probe) for probe in probes):
            return candidate
    return None


def _agree(
    tokenizer: PreTrainedTokenizerBase, candidate: str, system_prompt: str, messages: Sequence[ChatMessage]
) -> bool:
    from jinja2 import TemplateError  # noqa: PLC0415  (transformers imports it late as well)

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        expected = render_chat(tokenizer, system_prompt, messages)
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=candidate, tokenize=False, add_generation_prompt=True
        )
    except (SettingError, TemplateError):
        return False
    return bool(tokenizer(rendered, add_special_tokens=False)["input_ids"] == expected)


def _string(text: str) -> str:
    """The text as a Jinja string. A brace beside its partner is kept apart, for engines that look for tags first."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r").replace("\n", "\\n")
    for tag in ("{{", "{%", "{#", "}}", "%}", "#}"):
        escaped = escaped.replace(tag, f"{tag[0]}' ~ '{tag[1]}")
    return f"('{escaped}')"
