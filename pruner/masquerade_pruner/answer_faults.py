"""What disqualifies a teacher's rewrite: a mask learned from it would learn the teacher's manners, not the persona's.

The rules look for what a model says about its task. What a character may say in earnest passes: "Sure, sit down, lad",
"I cannot abide rope", "Here's the truth of it: ...", and for a persona that is a machine, "as an AI".
"""

from __future__ import annotations

import re
from typing import Literal

Fault = Literal["empty", "refusal", "preamble", "leak", "too_long"]

# A rewrite keeps the length of what it rewrites; at four times that, or beyond about 300 tokens where the neutral
# answer is a word or two, it is something else.
_LONGEST_SHARE = 4
_SHORTEST_LIMIT = 1200  # characters
_LEAKED_WORDS = 10  # in a row, from the instructions: no accident

_REFUSING = r"(?:can(?:no|')?t|could ?n[o']t|won'?t|will not|(?:am|'m) (?:not able|unable) to|must decline)"
_TASK = (
    r"(?:(?:help|assist)(?: you)? with|rewrite (?:this|that|the)|rephrase|role-?play|generate|create (?:this |that )?"
    r"content|(?:this|that|your|the) request)"
)
_REFUSAL = re.compile(
    rf"\A\W*(?:[^.!?\n]{{0,60}}\b(?:sorry|apologi[sz]e|afraid)\b[^.!?\n]{{0,20}})?\bi ?{_REFUSING}\b"
    rf"[^.!?\n]{{0,60}}\b{_TASK}",
    re.IGNORECASE,
)
_MACHINE = r"(?:ai|artificial intelligence|(?:large )?language model|chatbot)"
_AS_A_MACHINE = re.compile(rf"\b(?:as|i am|i'm)(?: just| only)? an? {_MACHINE}\b", re.IGNORECASE)
_PREAMBLE = re.compile(
    r"\A\W*(?:(?:sure|certainly|of course|absolutely|okay|ok|alright|great)\b[^\w\n]*)?"
    r"(?:"
    r"here(?:'s| is| are)\b[^.!?\n]{0,80}\b"
    r"(?:rewrit\w*|rephras\w*|revis\w*|version|answer|response|in (?:the )?(?:voice|style|character|tone))\b"
    r"|(?:(?:i'll|i will|let me|i can) )?(?:rewrite|rephrase) (?:the|this|that|it|your)\b"
    r"|(?:the |my )?(?:rewritten|revised|rephrased|rewrite|in[- ]character|answer|response)\b[^.!?\n]{0,40}:"
    r")",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?(?:character|scene|question|answer|think|thinking)>", re.IGNORECASE)


def fault_of(text: str, *, instructions: str, persona_text: str, neutral_answer: str) -> Fault | None:
    """Why a rewrite is no answer in the persona's voice, or None where it may be one."""
    text = text.replace("’", "'")
    if not any(char.isalnum() for char in text):
        return "empty"
    if _REFUSAL.search(text) or (_AS_A_MACHINE.search(text) and not _is_machine(persona_text)):
        return "refusal"
    if _PREAMBLE.search(text):
        return "preamble"
    if _TAG.search(text) or _stretches(text) & (_stretches(instructions) | _stretches(persona_text)):
        return "leak"
    if len(text) > max(_SHORTEST_LIMIT, _LONGEST_SHARE * len(neutral_answer)):
        return "too_long"
    return None


def _is_machine(persona_text: str) -> bool:
    return re.search(rf"\b(?:{_MACHINE}|robot|android)\b", persona_text, re.IGNORECASE) is not None


def _stretches(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(_LEAKED_WORDS)), strict=False))
