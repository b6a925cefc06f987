from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from masquerade_engine.base import Base
from masquerade_engine.prompt import ChatMessage, render_chat
from masquerade_engine.reference import reference_logits
from masquerade_masks import SettingError
from masquerade_pruner.multiple_choice import Choice, answer_choices, capability, load_choices
from masquerade_pruner.tree import masked


def test_the_set_that_ships_is_large_enough_and_sound() -> None:
    choices = load_choices()
    assert len(choices) >= 120
    assert len({one.id for one in choices}) == len({one.question for one in choices}) == len(choices)
    assert all(len(set(one.options)) == 4 for one in choices)
    places = np.bincount([one.answer for one in choices], minlength=4)
    assert places.min() > len(choices) / 6  # no place gives the answer away


@pytest.mark.parametrize("system_prompt", [None, "You are a test."])
def test_options_are_ranked_by_their_likelihood_a_byte(
    tiny_base: Base, tiny_model: torch.nn.Module, system_prompt: str | None
) -> None:
    choices = [
        Choice("1", "a", "What is it?", ("a long option that goes on", "no", "blé", "yes, twice"), 0),
        Choice("2", "b", "And this?", ("one", "two"), 1),
    ]
    wanted = []
    for one in choices:
        scores = []
        for option in one.options:
            if system_prompt is None:
                prompt = tiny_base.tokenizer(f"Question: {one.question}\nAnswer:")["input_ids"]
                answer = tiny_base.tokenizer(f" {option}")["input_ids"]  # a byte a token: nothing merges
            else:
                prompt = render_chat(tiny_base.tokenizer, system_prompt, [ChatMessage("user", one.question)])
                answer = tiny_base.tokenizer(option)["input_ids"]
            logits = reference_logits(tiny_model, torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
            likelihood = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
            scores.append(float(likelihood) / len(option.encode()))
        wanted.append(float(int(np.argmax(scores)) == one.answer))
        # The same scores with another option called right: exactly one of the four is.
    for answer in range(4):
        renamed = [Choice("1", "a", choices[0].question, choices[0].options, answer), choices[1]]
        found = answer_choices(tiny_base, tiny_model, renamed, masked(tiny_model), system_prompt=system_prompt)
        assert found[1] == wanted[1]
        if answer == 0:
            assert found[0] == wanted[0]
    total = sum(
        answer_choices(
            tiny_base,
            tiny_model,
            [Choice("1", "a", choices[0].question, choices[0].options, answer)],
            masked(tiny_model),
            system_prompt=system_prompt,
        )[0]
        for answer in range(4)
    )
    assert total == 1


def test_the_drop_is_paired() -> None:
    choices = [Choice(str(index), "ab"[index % 2], "?", ("x", "y"), 0) for index in range(40)]
    dense = np.ones(40)
    report = capability(choices, dense, dense - 1)
    assert report["drop"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert report["chance"] == 0.5
    assert report["by_topic"]["a"] == {"num_questions": 20, "dense": 1.0, "sculpted": 0.0}


@pytest.mark.parametrize(
    "row",
    [
        {"id": "1", "question": "?", "options": ["one"], "answer": 0},
        {"id": "1", "question": "?", "options": ["one", "two"], "answer": 2},
        {"id": "1", "question": "?", "options": ["one", ""], "answer": 0},
        {"id": "1", "options": ["one", "two"], "answer": 0},
    ],
)
def test_bad_sets_are_refused(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(SettingError, match="multiple-choice set"):
        load_choices(path)
