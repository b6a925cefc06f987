"""Characters for benchmarks: persona texts of a given length, and masks made for the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masquerade_engine import Base, ChatMessage, persona_system_prompt, render_chat
from masquerade_masks import Mask, SubNetwork, round_kept
from masquerade_server.bench.workload import WORDS, question

PROMPT_TOKENS = 170  # of a persona's prompt
QUESTION_TOKENS = 30

# Alternatives, between bars.
_NAMES = "Alda|Bram|Cato|Dunja|Edda|Falk|Gerda|Hal|Ines|Jory|Kuno|Lene|Milo|Nessa|Otto|Petra|Quill|Runa|Sven|Tilda"
_TRADES = "ferryman|baker|smith|falconer|beekeeper|mapmaker|midwife|gravedigger|piper|potter|tanner|clerk"
_MANNERS = "slowly and with long pauses|in short clipped orders|in riddles|far too fast|in a whisper|like a lawyer"
_THINGS = (
    "rain on slate|old ledgers|loud bells|salted butter|stray dogs|polished boots|gossip|thunder|closed doors|"
    "cheap wine|maps with errors|honest debts|cold mornings|the smell of tar|uneven stairs|long songs"
)
_SECRETS = (
    "you cannot read|you once let the town burn|you are paid by the enemy|you have a twin nobody met|"
    "you are afraid of water|you invented your own past"
)


@dataclass(frozen=True, slots=True)
class Character:
    """Who a persona is."""

    name: str
    text: str

    @property
    def system_prompt(self) -> str:
        """What precedes every chat."""
        return persona_system_prompt(self.name, self.text)


def character(base: Base, seed: object, *, prompt_tokens: int = PROMPT_TOKENS) -> Character:
    """A character whose prompt has `prompt_tokens` tokens, within two; another one for every seed from the start."""
    rng = random.Random(f"character {seed}")
    first, last, trade, past = (_some(rng, one)[0] for one in (_NAMES, _NAMES, _TRADES, _TRADES))
    name = f"{first} {last}son {rng.randrange(10_000)}"
    loves, hates = _some(rng, _THINGS, 3), _some(rng, _THINGS, 3)
    text = (
        f"You are a {trade} who once was a {past}. You speak {_some(rng, _MANNERS)[0]}. "
        f"You love {', '.join(loves[:2])} and {loves[2]}. You hate {', '.join(hates[:2])} and {hates[2]}. "
        f"Your secret is that {_some(rng, _SECRETS)[0]}. You answer questions with a story about"
    )
    missing = prompt_tokens - len(_tokens(base, persona_system_prompt(name, f"{text}.")))
    return Character(name, " ".join([text, *rng.choices(WORDS, k=max(1, missing))]) + ".")


def prompt(base: Base, character: Character, seed: object, *, question_tokens: int = QUESTION_TOKENS) -> list[int]:
    """The tokens of a chat with one question, another one for every seed."""
    asked = ChatMessage("user", question(question_tokens, seed))
    return render_chat(base.tokenizer, character.system_prompt, [asked])


def random_subnetwork(base: Base, sparsity: float, seed: int) -> SubNetwork:
    """A mask that keeps any `1 - sparsity` of every layer."""
    (made,) = overlapping_subnetworks(base, sparsity, 0.0, 1, seed)
    return made


def overlapping_subnetworks(
    base: Base, sparsity: float, union_sparsity: float, count: int, seed: int
) -> list[SubNetwork]:
    """Masks that drop `sparsity` each, and together keep no more than `1 - union_sparsity` of every layer."""
    shape = base.shape
    rng = np.random.default_rng(seed)
    size, kept = (round_kept(shape.intermediate_size, one) for one in (union_sparsity, sparsity))
    pool = rng.random((shape.num_layers, shape.intermediate_size)).argsort(axis=1)[:, :size]  # [layers, size]
    made = []
    for _ in range(count):
        chosen = rng.random(pool.shape).argsort(axis=1)[:, :kept]
        indices = np.take_along_axis(pool, chosen, axis=1)
        made.append(SubNetwork(base.fingerprint, shape, Mask.from_kept_indices(indices, shape.intermediate_size)))
    return made


def union_share(subnetworks: Sequence[SubNetwork]) -> float:
    """The share of neurons that any of them keeps."""
    dense = np.stack([one.mask.to_dense() for one in subnetworks])  # [count, layers, intermediate]
    return float(dense.any(axis=0).mean())


def _some(rng: random.Random, alternatives: str, count: int = 1) -> list[str]:
    return rng.sample(alternatives.split("|"), count)


def _tokens(base: Base, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])
