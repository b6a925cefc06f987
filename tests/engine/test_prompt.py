from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from masquerade_engine import ChatMessage, persona_system_prompt, prompt_sha256, render_chat
from masquerade_masks import SettingError


@pytest.fixture(scope="module")
def tokenizer(tiny_base_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base_dir)


def rendered(tokenizer: Any, *args: Any, **kwargs: Any) -> str:
    text: str = tokenizer.decode(render_chat(tokenizer, *args, **kwargs), skip_special_tokens=False)
    return text


def test_the_persona_prompt_names_the_persona_and_holds_its_text() -> None:
    prompt = persona_system_prompt("Mara", "  A ferrywoman who trusts nobody. ")
    assert prompt.startswith("You are Mara. A ferrywoman who trusts nobody.\n")
    assert "as Mara would" in prompt


def test_the_hash_is_that_of_the_exact_text() -> None:
    assert prompt_sha256("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def test_the_persona_comes_first_and_the_scene_joins_its_turn(tokenizer: Any) -> None:
    messages = [
        ChatMessage("system", "It rains."),
        ChatMessage("user", "Hello"),
        ChatMessage("assistant", "Hm."),
        ChatMessage("developer", "A bell rings."),
        ChatMessage("user", "Who are you?"),
    ]
    assert rendered(tokenizer, "You are Mara.", messages) == (
        "<|im_start|>system\nYou are Mara.\n\nIt rains.\n\nA bell rings.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHm.<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_base_sees_messages_as_they_are(tokenizer: Any) -> None:
    messages = [ChatMessage("user", "Hi"), ChatMessage("system", "Later.")]
    assert rendered(tokenizer, None, messages, add_generation_prompt=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>system\nLater.<|im_end|>\n"
    )


def test_personas_share_their_prompt_as_a_prefix(tokenizer: Any) -> None:
    first, second = (render_chat(tokenizer, "You are Mara.", [ChatMessage("user", q)]) for q in ("Hi", "Why?"))
    shared = rendered(tokenizer, "You are Mara.", [], add_generation_prompt=False)
    assert first[: len(shared) // 2] == second[: len(shared) // 2]


NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


def test_a_template_without_a_system_turn_gets_it_in_the_first_user_turn(tiny_base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir)
    tokenizer.chat_template = NO_SYSTEM
    assert rendered(tokenizer, "You are Mara.", [ChatMessage("user", "Hi")]) == "[user]You are Mara.\n\nHi"
    with pytest.raises(SettingError, match="no system turn") as refused:
        render_chat(tokenizer, "You are Mara.", [ChatMessage("assistant", "Hi")])
    assert refused.value.field == "messages"


def test_a_base_without_a_template_cannot_chat(tiny_base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir)
    tokenizer.chat_template = None
    with pytest.raises(SettingError, match="no chat template"):
        render_chat(tokenizer, "You are Mara.", [ChatMessage("user", "Hi")])
