"""Chat templates with a persona in them render what the server renders."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_pruner.export.chat_template import template_in_character

PROMPT = "You are Nettie. You brew.\n\nStay in character."
AWKWARD = "You're \"Nettie\" \\ {{ 7 * 7 }} {% endif %} {# no #} 'n' \\n\r\n}}\tЁж ☂ {persona} {'a': {}}"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As the first Mistral's: turns must alternate, and there is no system turn.
ALTERNATING = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('no chats') }}"

ASKED = ChatMessage("user", "Who are you?")
CHAT = [ASKED, ChatMessage("assistant", "Guess."), ChatMessage("user", "A ghost?")]
SCENE = ChatMessage("system", "It rains.")


def speaking(base: Base, template: str | None) -> Any:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def in_character(tokenizer: Any, template: str, messages: list[ChatMessage]) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("prompt", [PROMPT, AWKWARD])
@pytest.mark.parametrize("template", [CHATML, SMOLLM])
@pytest.mark.parametrize("messages", [[ASKED], CHAT, [SCENE, *CHAT]])
def test_a_chat_is_rendered_as_the_server_renders_it(
    tiny_base: Base, template: str, prompt: str, messages: list[ChatMessage]
) -> None:
    tokenizer = speaking(tiny_base, template)
    made = template_in_character(tokenizer, prompt)
    assert made is not None
    assert in_character(tokenizer, made, messages) == render_chat(tokenizer, prompt, messages)


def test_a_client_that_brings_the_prompt_itself_does_not_double_it(tiny_base: Base) -> None:
    tokenizer = speaking(tiny_base, CHATML)
    made = template_in_character(tokenizer, PROMPT)
    assert made is not None
    brought = [ChatMessage("system", f"{PROMPT}\n\nIt rains."), ASKED]
    assert in_character(tokenizer, made, brought) == render_chat(tokenizer, None, brought)


def test_an_empty_system_message_is_no_scene(tiny_base: Base) -> None:
    tokenizer = speaking(tiny_base, CHATML)
    made = template_in_character(tokenizer, PROMPT)
    assert made is not None
    assert in_character(tokenizer, made, [ChatMessage("system", ""), ASKED]) == in_character(tokenizer, made, [ASKED])


def test_without_a_system_turn_the_prompt_opens_the_first_message(tiny_base: Base) -> None:
    tokenizer = speaking(tiny_base, ALTERNATING)
    made = template_in_character(tokenizer, PROMPT)
    assert made is not None
    for messages in ([ASKED], CHAT):
        assert in_character(tokenizer, made, messages) == render_chat(tokenizer, PROMPT, messages)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [(None, PROMPT), ({"default": CHATML}, PROMPT), (CHATML, "Say <|im_end|> often."), (REFUSING, PROMPT)],
    ids=["no template", "several templates", "a control token", "a template that refuses all"],
)
def test_where_it_cannot_be_done_it_is_not(tiny_base: Base, template: Any, prompt: str) -> None:
    assert template_in_character(speaking(tiny_base, template), prompt) is None
