"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), run on the dense base and on a sub-network.

`lm_eval` is optional and imported when it is used. Its tasks see plain text: no chat template and no persona prompt.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masquerade_engine.base import Base
from masquerade_masks import SettingError
from masquerade_pruner.bootstrap import mean_interval
from masquerade_pruner.likelihood import Candidate, score
from masquerade_pruner.tree import Forward

MISSING = "lm-evaluation-harness is not installed: pip install 'masquerade[eval]'"
_SCORED = frozenset({"multiple_choice", "loglikelihood"})
_UNSCORED = "it generates text; the tasks that run here score given answers (openbookqa, piqa, arc_easy)"

TokenRequest = tuple[tuple[str, str], list[int], list[int]]  # texts, context tokens, continuation tokens


def require_lm_eval() -> None:
    """Raise `SettingError` where `lm_eval` is not installed."""
    _imported("lm_eval")


def run_tasks(
    base: Base,
    model: torch.nn.Module,
    forwards: Mapping[str, Forward],  # dense and sculpted
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    include: Path | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Every (sub)task's metrics under each forward, and the drop with its paired interval over the questions.

    A task whose name or data cannot be had, or that wants text generated, is reported as `unavailable`, with the
    reason. `include` is a folder with task files of one's own. Raises `SettingError` where `lm_eval` is missing.
    """
    evaluator = _imported("lm_eval.evaluator")
    manager = _imported("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    report: dict[str, Any] = {}
    for task in tasks:
        # Loading reads other people's code and hosts: what it can raise is not ours to list.
        try:
            loaded = manager.load([task])["tasks"]
        except Exception as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            report[task] = {"unavailable": f"lm_eval cannot load {task}, or its data is not reachable here: {first}"}
            continue
        if any(one.get_config("output_type") not in _SCORED for one in loaded.values()):
            report[task] = {"unavailable": _UNSCORED}
            continue
        rows = {
            name: _run(evaluator, manager, task_model(base, model, forward, between=between), task, limit, seed)
            for name, forward in forwards.items()
        }
        report |= _compared(rows)
    return report


def _run(evaluator: Any, manager: Any, lm: Any, task: str, limit: int | None, seed: int) -> dict[str, list[Any]]:
    """The samples of each (sub)task, in the order of its questions, after the task's first filter."""
    found = evaluator.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        name: sorted((row for row in rows if row["filter"] == rows[0]["filter"]), key=lambda row: row["doc_id"])
        for name, rows in found["samples"].items()
    }


def _compared(rows: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    dense, sculpted = rows["dense"], rows["sculpted"]
    report: dict[str, Any] = {}
    for name, samples in dense.items():
        report[name] = {"num_questions": len(samples)}
        for metric in samples[0]["metrics"]:
            if not isinstance(samples[0][metric], int | float | np.number):
                continue
            before, after = (np.array([float(row[metric]) for row in given]) for given in (samples, sculpted[name]))
            report[name][metric] = {
                "dense": mean_interval(before).as_dict(),
                "sculpted": mean_interval(after).as_dict(),
                "drop": mean_interval(before - after).as_dict(),
            }
    return report


def task_model(
    base: Base, model: torch.nn.Module, forward: Forward, *, between: Callable[[], None] = lambda: None
) -> Any:
    """A `TemplateLM` of `lm_eval` over one forward. Raises `SettingError` where `lm_eval` is missing."""
    template = _imported("lm_eval.api.model").TemplateLM
    made = type("SubNetworkLM", (_Scoring, template), {})
    lm: Any = made()
    lm.setup(base, model, forward, between)
    return lm


class _Scoring:
    """What `TemplateLM` leaves to its subclasses: tokens, and the likelihood of some behind others."""

    def setup(self, base: Base, model: torch.nn.Module, forward: Forward, between: Callable[[], None]) -> None:
        self.tokenizer = base.tokenizer
        self._base = base
        self._model = model
        self._forward = forward
        self._between = between

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self._base.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_ignored: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options)["input_ids"])

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_ignored: Any) -> list[tuple[float, bool]]:
        found = score(
            self._model,
            [self._fitted(context, continuation) for _, context, continuation in requests],
            self._forward,
            between=self._between,
        )
        return list(zip(found.log_likelihood.tolist(), found.greedy.tolist(), strict=True))

    def _fitted(self, context: list[int], continuation: list[int]) -> Candidate:
        """Cut from the left to the context's length, the continuation kept whole where it can be."""
        kept = continuation[-(self._base.context_length - 1) :]
        return Candidate(tuple(context[-(self._base.context_length - len(kept)) :]), tuple(kept))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(_UNSCORED)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError(_UNSCORED)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "lm_eval":
            raise SettingError("lm-eval", f"{error.name}, which lm_eval needs, is missing: {MISSING}") from error
        raise SettingError("lm-eval", MISSING) from error
