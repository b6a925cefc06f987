"""How often a sub-network ends its answers by itself, and how often it repeats itself, beside the dense persona model.

    python benchmarks/stop_rates.py --quick                          # minutes: one small sculpt, to try it
    python benchmarks/stop_rates.py examples/personas/*.txt --sparsity 0.5

Every persona is sculpted, or its sculpt found in the work directory. A sculpt's report has both figures of 48 answers,
where a rate of one in ten is known to some nine points either way; here the sub-network answers every test question, as
the dense model did. Answers are cut where those were. They are kept in the work directory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import machine
from sculpts import material, personas, sculpted, usual_workdir
from tables import header, percent, row

from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.engine import Engine
from masquerade_engine.requests import PersonaFunction
from masquerade_engine.settings import EngineSettings
from masquerade_engine.threads import available_cores
from masquerade_pruner import PRESETS, SculptResult, SculptSpec
from masquerade_pruner.bootstrap import Values, mean_interval
from masquerade_pruner.evaluation import repetition
from masquerade_pruner.examples import Example
from masquerade_pruner.instructions import load_instructions
from masquerade_pruner.synthesis import answer, plan_held_out
from masquerade_pruner.teacher import SelfTeacher
from masquerade_pruner.workdir import Workdir

STREAMS = 64  # answers written at once


@dataclass(frozen=True, slots=True)
class Answers:
    """Both models' answers to the same questions, in the same order."""

    dense: Sequence[Example]
    sculpted: Sequence[Example]

    def ended(self) -> tuple[Values, Values]:
        """1 where an answer ended by itself, else 0: the dense model's and the sub-network's."""
        dense, sculpted = (np.array([float(one.ended) for one in side]) for side in (self.dense, self.sculpted))
        return dense, sculpted


def measured(base: Base, result: SculptResult, folder: Path, max_tokens: int) -> Answers:
    """The dense model's test answers, and the sub-network's to the same questions."""
    dense = material(result).test
    cell = Workdir(folder, {"digest": result.subnetwork.digest, "max_tokens": max_tokens})
    found = cell.read_examples("sculpted")
    if not found:
        by_id = {one.id: one for one in load_instructions().test}
        planned = plan_held_out([(by_id[one.question_id], 0.0) for one in dense], seed=1)
        function = PersonaFunction(result.subnetwork.digest, "stop rates", result.subnetwork)
        with closing(Engine(base, EngineSettings(max_num_seqs=STREAMS, max_queue=len(planned)))) as engine:
            found = answer(
                planned,
                base=base,
                system_prompt=result.system_prompt,
                teacher=SelfTeacher(engine, function),
                max_tokens=max_tokens,
            )
        cell.write_examples("sculpted", found)
    by_question = {one.question_id: one for one in found}
    answered = [one for one in dense if one.question_id in by_question]
    return Answers(answered, [by_question[one.question_id] for one in answered])


def table(answers: Mapping[str, Answers]) -> list[str]:
    """A line a persona, and one of all answers."""
    lines = header(
        "persona", "answers", "ended, dense", "sculpted", "sculpted less dense", "repetition, dense", "sculpted"
    )
    lines += [_line(name, one) for name, one in answers.items()]
    everyone = list(answers.values())
    together = Answers(*([one for side in sides for one in side] for sides in _sides(everyone)))
    return [*lines, _line("all", together)]


def _sides(answers: Sequence[Answers]) -> tuple[list[Sequence[Example]], list[Sequence[Example]]]:
    return [one.dense for one in answers], [one.sculpted for one in answers]


def _line(name: str, answers: Answers) -> str:
    dense, sculpted = answers.ended()
    repeated = (f"{repetition(side):.1%}" for side in (answers.dense, answers.sculpted))
    rates = f"{dense.mean():.1%}", f"{sculpted.mean():.1%}", percent(mean_interval(sculpted - dense))
    return row(name, str(len(dense)), *rates, *repeated)


def main() -> None:
    """Sculpt or find, answer, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(options.model, cache_dir=options.workdir / "cache")
    max_tokens = PRESETS[options.preset].answer_tokens
    lines = [
        "# Answers that end by themselves",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"Free-running answers of at most {max_tokens} tokens to the test questions, at temperature 1; 95 % intervals",
        "from a paired bootstrap over answers. *Repetition*: the share of an answer's runs of four tokens that repeat",
        "an earlier one of it.",
    ]
    for sparsity in options.sparsity:
        answers = {}
        for case in personas(options.personas):
            result = sculpted(SculptSpec(*case, sparsity=sparsity, preset=options.preset), base, options.workdir)
            folder = options.workdir / f"{case[0]}-{sparsity}" / "stop-rates"
            answers[case[0]] = measured(base, result, folder, max_tokens)
        lines += ["", f"## {sparsity:.0%} dropped", "", *table(answers)]
    print("\n".join([*lines, ""]))
    if options.out:
        options.out.write_text("\n".join([*lines, ""]), "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personas", nargs="*", help="text files or ids of ready personas; default: all of these")
    parser.add_argument("--model", default=BUNDLED, help="the base, as `masquerade serve` takes it")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--workdir", type=Path, help="default: that of fidelity.py, or one of its own with --quick")
    parser.add_argument("--quick", action="store_true", help="the smoke preset, one persona, one sparsity")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.preset = "smoke"
        options.personas = (options.personas or ["pip"])[:1]
        options.sparsity = options.sparsity[:1]
    if options.workdir is None:
        options.workdir = usual_workdir(quick=options.quick)
    return options


if __name__ == "__main__":
    main()
