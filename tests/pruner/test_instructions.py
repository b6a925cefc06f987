from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from masquerade_masks import SettingError
from masquerade_pruner.instructions import Instruction, load_instructions, without_near_duplicates
from masquerade_pruner.sensitivity import load_references


def test_builtin_set_is_as_large_and_varied_as_promised() -> None:
    instructions = load_instructions()
    everything = [*instructions.train, *instructions.validation, *instructions.test]
    assert len(everything) >= 600
    assert len({one.topic for one in everything}) >= 20
    assert len(instructions.test) >= 100
    assert len({one.id for one in everything}) == len(everything)


def test_builtin_set_has_no_near_duplicates_to_drop() -> None:
    instructions = load_instructions()
    assert len(instructions.train) + len(instructions.validation) + len(instructions.test) == 839


def test_no_topic_is_in_two_splits() -> None:
    instructions = load_instructions()
    topics = [
        {one.topic for one in split} for split in (instructions.train, instructions.validation, instructions.test)
    ]
    assert not topics[0] & topics[1]
    assert not topics[0] & topics[2]
    assert not topics[1] & topics[2]


def test_reference_personas_are_ten_or_more_and_distinct() -> None:
    references = load_references()
    assert len(references) >= 10
    assert len({one.text for one in references}) == len(references)


def test_near_duplicates_go_and_different_thoughts_stay() -> None:
    texts = [
        "What is your favourite colour of the autumn forest?",
        "What is your favourite colour of the autumn forest",
        "How does a lock on a canal lift a barge?",
    ]
    kept = without_near_duplicates([Instruction(text, "t", text, "", "train") for text in texts])
    assert [one.text for one in kept] == [texts[0], texts[2]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_alpaca_files_are_split_by_topic_or_template(tmp_path: Path, suffix: str) -> None:
    words = ["amber", "basalt", "cedar", "dune", "ember", "fjord", "granite", "harbour", "island", "jungle"]
    rows = [
        {"instruction": f"{verb} the {word} {index}", "input": "", "output": "x"}
        for index, word in enumerate(words * 6)
        for verb in (f"Describe{index % 13}", f"Explain{index % 11}", f"Sketch{index % 7}")
    ]
    file = tmp_path / f"set{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    instructions = load_instructions(file)
    groups = Counter()
    for split in (instructions.train, instructions.validation, instructions.test):
        groups.update({one.topic for one in split})
    assert max(groups.values()) == 1
    assert instructions.digest == load_instructions(file).digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "cannot be read"),
        ('{"instruction": "one object"}', "not a list"),
        ('[{"output": "no question"}]', "no `instruction`"),
        ('[{"instruction": "Only one?", "output": "yes"}]', "at least"),
    ],
)
def test_bad_instruction_files_are_refused_with_a_sentence(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "set.json"
    file.write_text(content)
    with pytest.raises(SettingError, match=says) as refused:
        load_instructions(file)
    assert refused.value.field == "instructions"
