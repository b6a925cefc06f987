from __future__ import annotations

import json
from pathlib import Path

import pytest

from masquerade_masks import SettingError
from masquerade_pruner.question_files import FileQuestion, load_questions


def test_persona_vectors(tmp_path: Path) -> None:
    path = tmp_path / "pride.json"
    content = {
        "instruction": [{"pos": "Be proud.", "neg": "Be humble."}, {"pos": "Boast."}],
        "questions": ["Who won?", "Who lost?"],
        "eval_prompt": "Is it proud? {question} {answer}",
    }
    path.write_text(json.dumps(content))
    found = load_questions(path)
    assert found.questions == (FileQuestion("Who won?"), FileQuestion("Who lost?"))
    assert found.scenes == ("Be proud.", "Boast.")
    assert found.eval_prompt == content["eval_prompt"]
    path.write_text(json.dumps({"questions": ["Who won?"]}))
    bare = load_questions(path)
    assert (bare.scenes, bare.eval_prompt) == ((), None)


def test_role_bench(tmp_path: Path) -> None:
    rows = [
        {"role": "Mira", "question": "Where? ", "generated": ["Here.", " "]},
        {"role": "Tom", "question": "Why?", "generated": "Because."},
        {"role": "Tom", "question": "When?"},
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    own = load_questions(path, persona_name="mira")
    assert (own.role, own.questions) == ("Mira", (FileQuestion("Where?", ("Here.",)),))
    everybody = load_questions(path, persona_name="Nettie")
    assert everybody.role is None
    assert [one.references for one in everybody.questions] == [("Here.",), ("Because.",), ()]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[]", "not an object"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"questions": []}', "list of texts"),
        ("a.json", '{"questions": [" "]}', "list of texts"),
        ("a.json", '{"questions": ["?"], "instruction": [{"neg": "x"}]}', "`pos`"),
        ("a.json", '{"questions": ["?"], "eval_prompt": "score it"}', "{answer}"),
        ("a.jsonl", "", "no question"),
        ("a.jsonl", "{}\n", "line 1"),
        ("a.jsonl", '{"question": "?"}\nnot json', "line 2"),
        ("a.jsonl", '{"question": "?", "generated": [1]}', "`generated`"),
    ],
)
def test_bad_files_are_refused_with_a_sentence(tmp_path: Path, name: str, content: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SettingError) as refused:
        load_questions(path)
    assert refused.value.field == "questions"
    assert says in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        load_questions(tmp_path / "nowhere.json")
