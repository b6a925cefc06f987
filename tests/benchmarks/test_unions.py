"""A cast's masks are learned in order, each once, and what is said of them is counted right; on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unions
from unions import Cast, Learned, Run, chance_union, chosen, mean_jaccard, short, tables, union_fraction, village

from masquerade_engine import load_base
from masquerade_engine.base import Base
from masquerade_masks import Mask, SettingError
from masquerade_pruner import PRESETS, SculptSettings, SculptSpec, sculpt
from masquerade_pruner.prior import Prior, prior_path, write_prior

PEOPLE = [
    ("wyn", "Wyn", "You row a ferry and say little."),
    ("hob", "Hob", "You grind corn and SHOUT."),
    ("tib", "Tib", "You mend boots and hate landlords."),
]
PULL = 1.5
SPARSITIES = (0.5, 0.3)


def _learned(*rows: str, validation: float = 1.0, test: tuple[float, ...] = (1.0, 2.0)) -> Learned:
    """A mask drawn with x for what is kept, a string a layer."""
    return Learned(
        Mask.from_dense(np.array([[one == "x" for one in line] for line in rows])), validation, np.array(test)
    )


# --- the arithmetic


def test_unions_and_overlaps_are_means_over_layers_and_pairs() -> None:
    masks = [_learned("xx..", "xx.."), _learned("x.x.", "xx.."), _learned("..xx", "xx..")]
    assert union_fraction(masks[:1]) == 0.5
    assert union_fraction(masks[:2]) == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert union_fraction(masks) == pytest.approx((4 / 4 + 2 / 4) / 2)
    pairs = [(1 / 3 + 1) / 2, (0 + 1) / 2, (1 / 3 + 1) / 2]
    assert mean_jaccard(masks) == pytest.approx(sum(pairs) / 3)


def test_the_chance_line_is_what_random_masks_have() -> None:
    rng = np.random.default_rng(0)
    size, kept, count = 4096, 1024, 5
    masks = [
        Learned(Mask.from_kept_indices([np.sort(rng.permutation(size)[:kept])], size), 1.0, np.ones(2))
        for _ in range(count)
    ]
    assert chance_union(0.25, 1) == 0.25
    assert union_fraction(masks) == pytest.approx(chance_union(kept / size, count), abs=0.02)


def test_ratios_count_personas_the_same_and_pair_questions() -> None:
    alone = [_learned("x.", test=(1.0, 3.0), validation=1.0), _learned("x.", test=(10.0, 30.0), validation=10.0)]
    pulled = [_learned("x.", test=(1.5, 4.5), validation=1.2), _learned("x.", test=(10.0, 30.0), validation=9.0)]
    assert unions.validation_ratio(pulled, alone) == pytest.approx((1.2 + 0.9) / 2)
    ratio = unions.kl_ratio(pulled, alone)
    assert ratio.mean == pytest.approx((1.5 + 1.0) / 2)
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 1.5))  # either persona twice; their questions all agree
    one = unions.kl_ratio(pulled[:1], alone[:1])
    assert (one.mean, one.low, one.high) == pytest.approx((1.5, 1.5, 1.5))


def _cast(costs: dict[float, float], sparsity: float = 0.5) -> Cast:
    """Pulled by 0.1 the second mask joins the first in all but one neuron, by 0.2 it is the first's own."""
    first, apart = _learned("xx..", "xx.."), _learned("..xx", "..xx")
    seconds = {0.1: ("x.x.", "xx.."), 0.2: ("xx..", "xx..")}
    return Cast(
        sparsity, [first, apart], {pull: [first, _learned(*seconds[pull], validation=costs[pull])] for pull in costs}
    )


def test_the_smallest_union_that_validation_affords_is_chosen() -> None:
    assert chosen([_cast({0.1: 1.0, 0.2: 1.02})]) == 0.2
    assert chosen([_cast({0.1: 1.0, 0.2: 1.05})]) == 0.1  # the first of the cast, who is as alone, dilutes nothing
    assert chosen([_cast({0.1: 1.04, 0.2: 1.05})]) is None
    assert chosen([_cast({0.1: 1.0, 0.2: 1.0}), _cast({0.1: 1.0, 0.2: 1.05})]) == 0.1  # both have to afford it


def test_tables_by_pull_by_count_and_by_persona() -> None:
    lines = tables([_cast({0.1: 1.0, 0.2: 1.05})], ["Wyn", "Hob"])
    assert lines[0] == "Chosen on validation: **0.1**."
    assert "| unrelated masks | 0.750 | 0.333 |  |  |  |  |" in lines
    assert "| alone | 1.000 | 0.000 | 1.000 |  | 1.500 |  |" in lines
    assert "| 0.2 | 0.500 | 1.000 | 1.050 | 1.050 | 1.500 | 1.000 (1.000 to 1.000) |" in lines
    assert "| 2 | 0.750 | 1.000 | 0.625 | 0.000 | 0.667 | 1.000 (1.000 to 1.000) |" in lines
    assert "| Hob | 1.000 | 1.000 | 1.050 | 1.500 | 1.500 | 1.500 |" in lines
    assert tables([_cast({0.2: 1.05})], ["Wyn", "Hob"])[0] == "Every pull costs more than that."


# --- the run


@pytest.fixture(scope="module")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), cache_dir=tiny_base_dir.parent / "cache", dtype="fp32")


@pytest.fixture(scope="module")
def new_run(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`new_run(**settings)`: another process that goes on in the same work directory."""
    folder = tmp_path_factory.mktemp("unions")
    rows = [
        {"instruction": f"{word} {topic} {word[::-1]}?", "input": "", "output": "Yes.", "topic": topic}
        for topic in (f"topic{index}" for index in range(24))
        for word in ("alpha", "brick")
    ]
    questions = folder / "questions.json"
    questions.write_text(json.dumps(rows), "utf-8")
    shape = base.shape
    scores = torch.rand(shape.num_layers, shape.intermediate_size, generator=torch.Generator().manual_seed(0))
    write_prior(prior_path(base, folder / "work" / "cache"), base, Prior({32: scores}), "random")
    settings = replace(
        short(PRESETS["smoke"], steps=4), answer_tokens=6, num_validation=4, num_test=4, learning_rate=0.2
    )
    return lambda **changed: Run(base, replace(settings, **changed), folder / "work", questions)


@pytest.fixture(scope="module")
def casts(new_run: Callable[..., Run]) -> list[Cast]:
    return _learned_by(new_run(), PEOPLE)


def _learned_by(run: Run, people: list[tuple[str, str, str]]) -> list[Cast]:
    casts = [Cast(sparsity, [], {PULL: []}) for sparsity in SPARSITIES]
    for persona in people:
        run.add(persona, casts)
    return casts


def test_pulled_masks_have_the_smaller_union(casts: list[Cast]) -> None:
    for cast, kept in zip(casts, (32, 64), strict=True):
        pulled = cast.pulled[PULL]
        assert pulled[0] is cast.alone[0]
        assert union_fraction(pulled) < union_fraction(cast.alone) - 0.02
        assert mean_jaccard(pulled) > mean_jaccard(cast.alone) + 0.02
        everybody = (*pulled, *cast.alone)
        assert len(pulled) == len(cast.alone) == len(PEOPLE)
        assert {one.mask.kept for one in everybody} == {kept}
        assert all(len(one.test) == 4 and one.test.mean() > 0 and one.validation > 0 for one in everybody)


@pytest.mark.parametrize(("pull", "moved"), [(0.2, {True}), (9.0, {True, False})])
def test_a_mask_is_the_sculptor_s_own_whether_steps_can_move_it_or_not(
    pull: float,
    moved: set[bool],
    new_run: Callable[..., Run],
    base: Base,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    may_move = unions._Learner.may_move
    monkeypatch.setattr(unions._Learner, "may_move", lambda self: asked.append(may_move(self)) or asked[-1])
    run, cast = new_run(learning_rate=0.09), Cast(SPARSITIES[0], [], {pull: []})
    for persona in PEOPLE[:2]:
        run.add(persona, [cast])
    assert set(asked) <= moved
    assert (asked[-1] is True) == (moved == {True})
    towards = [one.mask for one in cast.pulled[pull][:1]]
    numbers = replace(run._settings, cast_pull=pull)
    spec = SculptSpec(*PEOPLE[1], sparsity=SPARSITIES[0], numbers=numbers, instructions=run._instructions)
    result = sculpt(spec, base, tmp_path, cache_dir=run._workdir / "cache", cast=towards)
    own = cast.pulled[pull][1]
    assert result.subnetwork.mask == own.mask
    assert result.report["one_turn"]["per_question"]["kl"] == pytest.approx(own.test.tolist(), abs=1e-4)


def test_a_finished_run_learns_nothing_again(
    casts: list[Cast], new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "_learn", None)
    again = _learned_by(new_run(), PEOPLE)
    assert tables(again, ["Wyn", "Hob", "Tib"]) == tables(casts, ["Wyn", "Hob", "Tib"])
    for one, other in zip(again, casts, strict=True):
        assert [each.mask for each in one.pulled[PULL]] == [each.mask for each in other.pulled[PULL]]


def test_another_cast_or_other_numbers_are_learned_anew_from_the_same_answers(
    casts: list[Cast], new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float, float]] = []
    learn = Run._learn

    def watched(self: Run, persona: tuple[str, str, str], wanted: Any) -> Any:
        asked.extend((persona[0], one.sparsity, one.pull) for one in wanted)
        return learn(self, persona, wanted)

    answers = new_run()._workdir / "hob" / "answers" / "train_plain.jsonl"
    written = answers.stat().st_mtime_ns
    monkeypatch.setattr(Run, "_learn", watched)
    _learned_by(new_run(), [PEOPLE[2], PEOPLE[1]])
    assert asked == [("hob", sparsity, PULL) for sparsity in SPARSITIES]  # alone they were known
    asked.clear()
    _learned_by(new_run(learning_rate=0.05), PEOPLE[1:2])
    assert asked == [("hob", sparsity, 0.0) for sparsity in SPARSITIES]
    assert answers.stat().st_mtime_ns == written


def test_a_base_without_a_prior_is_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no prior"):
        Run(base, PRESETS["smoke"], tmp_path)


# --- the command


class _Drawn:
    """In a run's place: everyone alone keeps other neurons than everyone pulled."""

    def __init__(self, base: object, settings: SculptSettings, workdir: Path) -> None:
        pass

    def add(self, persona: tuple[str, str, str], casts: list[Cast]) -> None:
        for cast in casts:
            if len(cast.alone) == 3:
                raise KeyboardInterrupt
            cast.alone.append(_learned("xx.." if len(cast.alone) % 2 else "..xx"))
            for before in cast.pulled.values():
                before.append(_learned("xx.."))


def test_a_killed_command_leaves_the_page_so_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(unions, "load_base", lambda *rest, **keywords: None)
    monkeypatch.setattr(unions, "Run", _Drawn)
    page = tmp_path / "unions.md"
    arguments = ["--pull", "0.2", "0.3", "--workdir", str(tmp_path), "--out", str(page)]
    monkeypatch.setattr("sys.argv", ["benchmarks/unions.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        unions.main()
    text = page.read_text("utf-8")
    assert f"`python benchmarks/unions.py {' '.join(arguments)}` on " in text
    assert "The first 3 personas of the village. Short learning, 8 steps of\n8 branches" in text
    assert "the base's prior;\n32 validation and 32 test questions" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## 25% dropped", "## 50% dropped"]
    assert text.count("The first so many masks, pulled by 0.3:") == 2


@pytest.mark.parametrize("wrong", [["--personas", "1"], ["--personas", "25"], ["--pull", "0.1", "0.0"]])
def test_options_that_make_no_curve_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["unions.py", *wrong])
    with pytest.raises(SystemExit):
        unions.main()


# --- the village


def test_the_village_is_of_one_size_and_everyone_is_somebody_else() -> None:
    people = village()
    assert len(people) == len({one[0] for one in people}) == len({one[1] for one in people}) == 24
    for persona_id, name, text in people:
        SculptSpec(persona_id, name, text)
        assert 120 <= len(text.split()) <= 170, persona_id
