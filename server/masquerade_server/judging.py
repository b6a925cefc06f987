"""What the judge says of an appraisal: every answer scored, and the two models compared answer by answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from masquerade_server.judge import COHERENCE, IN_CHARACTER, JudgeSettings, Verdicts, ask, fill

if TYPE_CHECKING:
    from masquerade_pruner.appraisal import Spoken

Scores = Mapping[str, Sequence[float | None]]  # by criterion, in the order of the answers


@dataclass(frozen=True, slots=True)
class Judgement:
    """The report's part, and each answer's scores."""

    report: dict[str, Any]
    scores: Scores


def judge(
    settings: JudgeSettings,
    spoken: Sequence[Spoken],
    system_prompt: str,
    *,
    eval_prompt: str | None = None,
    on_done: Callable[[str, int, int], None] = lambda criterion, done, total: None,
) -> Judgement:
    """Score every answer for being in character and for coherence, and those of a question file by its own prompt.

    Raises `JudgeError`.
    """
    prompts: dict[str, list[str | None]] = {
        "in_character": [_prompt(IN_CHARACTER, one, system_prompt) for one in spoken],
        "coherence": [_prompt(COHERENCE, one, system_prompt) for one in spoken],
    }
    if eval_prompt is not None:
        prompts["eval_prompt"] = [
            _prompt(eval_prompt, one, system_prompt) if one.part.startswith("questions/") else None for one in spoken
        ]
    report: dict[str, Any] = {"model": settings.model, "endpoint": settings.endpoint}
    scores: dict[str, list[float | None]] = {}
    for criterion, wanted in prompts.items():
        places = [place for place, prompt in enumerate(wanted) if prompt is not None]

        def tell(done: int, total: int, criterion: str = criterion) -> None:
            on_done(criterion, done, total)

        verdicts = ask(settings, [prompt for prompt in wanted if prompt is not None], on_done=tell)
        scores[criterion] = [None] * len(spoken)
        for place, score in zip(places, verdicts.scores, strict=True):
            scores[criterion][place] = score
        report[criterion] = _counts(verdicts) | compare(spoken, scores[criterion])
    return Judgement(report, scores)


def compare(spoken: Sequence[Spoken], scores: Sequence[float | None]) -> dict[str, Any]:
    """By part: the mean score of both models, and the difference, over the questions where both have one."""
    import numpy as np  # noqa: PLC0415  (the command line's help imports this module's callers)

    from masquerade_pruner.bootstrap import mean_interval  # noqa: PLC0415

    given: dict[str, dict[str, dict[str, float]]] = {}  # part, question, model
    for one, score in zip(spoken, scores, strict=True):
        if score is not None:
            given.setdefault(one.part, {}).setdefault(one.id, {})[one.model] = score
    report = {}
    for part, questions in given.items():
        both = [found for found in questions.values() if len(found) == 2]
        if both:
            dense, sculpted = (np.array([found[model] for found in both]) for model in ("dense", "sculpted"))
            report[part] = {
                "num_questions": len(both),
                "dense": mean_interval(dense).as_dict(),
                "sculpted": mean_interval(sculpted).as_dict(),
                "difference": mean_interval(sculpted - dense).as_dict(),
            }
    return report


def _counts(verdicts: Verdicts) -> dict[str, int]:
    return {
        "num_judged": sum(score is not None for score in verdicts.scores),
        "num_unparsable": verdicts.num_unparsable,
        "num_failed": verdicts.num_failed,
    }


def _prompt(template: str, spoken: Spoken, system_prompt: str) -> str:
    scene = "" if spoken.scene is None else f"\n[Scene]\n{spoken.scene}\n"
    if spoken.history:
        speakers = ("Message", "Reply")
        said = [f"{speakers[place % 2]}: {text}" for place, text in enumerate(spoken.history)]
        scene += "\n[Said before]\n" + "\n".join(said) + "\n"
    return fill(template, persona=system_prompt, scene=scene, question=spoken.question, answer=spoken.answer)
