"""What is dropped, and what a character may say in earnest."""

from __future__ import annotations

import pytest

from masquerade_pruner.answer_faults import fault_of

PERSONA = "A brewer who measures every hour by the kettle and who has never once in forty years watered a barrel."
INSTRUCTIONS = "Rewrite the answer below so that it sounds exactly like the character and keep it about as long."
NEUTRAL = "Rain and rivers slowly dissolve minerals from rocks and carry them to the sea."


def judge(text: str, persona: str = PERSONA, neutral: str = NEUTRAL) -> str | None:
    return fault_of(text, instructions=INSTRUCTIONS, persona_text=persona, neutral_answer=neutral)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (" \n... ", "empty"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m sorry, but I can’t assist with that request.", "refusal"),
        ("Sorry, I cannot rewrite this answer.", "refusal"),
        ("I am unable to role-play as real people.", "refusal"),
        ("I'm not able to role-play as real people.", "refusal"),
        ("As an AI language model, I have no feelings about the sea.", "refusal"),
        ("The sea? I am just an AI, so I do not know.", "refusal"),
        ("Sure, here is the rewritten answer:\n\nThe sea is salt because of the rocks.", "preamble"),
        ("Sure! Here's the answer in the brewer's voice: The sea is salt.", "preamble"),
        ("Here is a version of it. The sea is salt.", "preamble"),
        ("Rewritten answer: The sea is salt because of the rocks.", "preamble"),
        ("**Answer:** The sea is salt.", "preamble"),
        ("Certainly. I'll rewrite it. The sea is salt.", "preamble"),
        ("Rewrite the answer so that it uses all the information.", "preamble"),
        ("<answer>The sea is salt.</answer>", "leak"),
        ("The sea is salt. </think>", "leak"),
        ("It sounds exactly like the character, and keep it about as long. The sea is salt.", "leak"),
        ("You are one who has never once in forty years watered a barrel. The sea is salt.", "leak"),
        ("Salt " * 241, "too_long"),
    ],
)
def test_what_the_teacher_says_about_its_task_is_dropped(text: str, fault: str) -> None:
    assert judge(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        "Sure, sit down, lad: the sea is salt because the rivers steal it from the rocks.",
        "Here's the truth of it: rain licks the rocks, and the sea keeps what it licked.",
        "I cannot abide rope, but I know the sea.",
        "I'm afraid I won't help you move that barrel.",
        "I can't rewrite history, lad, nor unsalt the sea.",
        "Of course the sea is salt! Rain and rivers slowly dissolve minerals from rocks and carry them to the sea.",
        "Salt " * 240,
    ],
)
def test_what_a_character_says_is_kept(text: str) -> None:
    assert judge(text) is None


def test_a_machine_may_say_what_it_is() -> None:
    text = "As an AI, I watch the tide and envy it."
    assert judge(text) == "refusal"
    assert judge(text, persona="An AI that keeps a lighthouse.") is None


def test_a_long_answer_may_be_rewritten_at_length() -> None:
    long = "salt " * 500
    assert judge(long, neutral="x" * 600) == "too_long"
    assert judge(long, neutral="x" * 650) is None
