"""The bridge to lm-evaluation-harness: its arithmetic always, the harness itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from reference_scores import brute_force

from masquerade_engine.base import Base
from masquerade_masks import SettingError
from masquerade_pruner.likelihood import Candidate
from masquerade_pruner.lm_eval_tasks import _Scoring, require_lm_eval, run_tasks, task_model
from masquerade_pruner.tree import masked


def test_continuations_are_scored_as_they_are_alone(tiny_base: Base, tiny_model: torch.nn.Module) -> None:
    scoring = _Scoring()
    scoring.setup(tiny_base, tiny_model, masked(tiny_model), lambda: None)
    context, continuation = scoring.tok_encode("Question: why?"), scoring.tok_encode(" because", False)
    long = [*range(200)] * 4
    requests = [(("", ""), context, continuation), (("", ""), long, continuation)]
    (likelihood, greedy), (cut, _) = scoring._loglikelihood_tokens(requests, disable_tqdm=True)
    wanted = brute_force(tiny_model, Candidate(tuple(context), tuple(continuation)), None)
    assert likelihood == pytest.approx(wanted[0], abs=1e-4)
    assert greedy == wanted[1]
    last = tuple(long[-(512 - len(continuation)) :])  # the newest of what fits the context
    assert cut == pytest.approx(brute_force(tiny_model, Candidate(last, tuple(continuation)), None)[0], abs=1e-3)


def test_a_missing_harness_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingError, match=r"pip install 'masquerade\[eval\]'"):
        require_lm_eval()


def test_tasks_of_the_harness_itself(
    tiny_base: Base, tiny_model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"q": f"What is {n}?", "options": ["this one", "that", "none of it"], "gold": n % 3} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ours.yaml").write_text(
        f"task: ours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: 'Question: {{q}}\\nAnswer:'\ndoc_to_target: gold\n"
        "doc_to_choice: options\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (tmp_path / "written.yaml").write_text(
        f"task: written\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    dense, none = masked(tiny_model), masked(tiny_model, torch.zeros(3, 96))
    tasks = ["ours", "no-such-task", "openbookqa", "written"]
    report = run_tasks(tiny_base, tiny_model, {"dense": dense, "sculpted": none}, tasks, include=tmp_path)
    hits = []
    for row in rows:
        prompt = tuple(tiny_base.tokenizer(f"Question: {row['q']}\nAnswer:")["input_ids"])
        scores = [
            brute_force(tiny_model, Candidate(prompt, tuple(tiny_base.tokenizer(f" {one}")["input_ids"])), None)[0]
            for one in row["options"]
        ]
        hits.append(scores.index(max(scores)) == row["gold"])
    assert report["ours"]["num_questions"] == 6
    assert report["ours"]["acc"]["dense"]["mean"] == pytest.approx(sum(hits) / 6, abs=1e-4)
    assert set(report["ours"]["acc_norm"]) == {"dense", "sculpted", "drop"}
    assert "no-such-task" in report["no-such-task"]["unavailable"]
    assert "not reachable" in report["openbookqa"]["unavailable"]  # its data is on the hub, and the tests are offline
    assert "generates text" in report["written"]["unavailable"]
    lm = task_model(tiny_base, tiny_model, dense)
    assert (lm.rank, lm.world_size) == (0, 1)
