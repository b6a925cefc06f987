"""What a teacher is worth: one persona sculpted by the base's own answers and by those of other chat models.

    python benchmarks/teachers.py                             # the base, and a server of it with two that rewrite
    python benchmarks/teachers.py --teacher https://host/v1 weak --teacher https://host/v1 strong
    python benchmarks/teachers.py --steps 12 --questions 48   # half of the time
    python benchmarks/teachers.py --preset smoke              # a try-out

`--teacher URL MODEL` may be given several times; MASQUERADE_TEACHER_API_KEY is sent to each. Without one, a Masquerade
server of the bundled model is started, with a persona that rewrites neutral answers: by the whole model, which is about
the weakest teacher there is, and by half of its FFN neurons, which is a weaker one.

Every mask is then measured on every teacher's held-out answers. What another teacher wrote is no mask's home ground but
its own: read a column from top to bottom. A killed run goes on where it was, and asks no teacher twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from machine import machine
from masked_persona import upload
from serving import CACHE_DIR, serving

from masquerade_client import Masquerade
from masquerade_engine.base import BUNDLED, Base, load_base
from masquerade_engine.threads import available_cores
from masquerade_masks import Mask, TeacherError, round_kept
from masquerade_pruner import PRESETS, Progress, SculptResult, SculptSettings, SculptSpec, sculpt
from masquerade_pruner.bootstrap import mean_interval
from masquerade_pruner.examples import Example, read_examples
from masquerade_pruner.held_out import HeldOut
from masquerade_pruner.learner import build_learner
from masquerade_pruner.mask_learning import top_k_mask
from masquerade_pruner.prior import prior_of
from masquerade_pruner.tree import Forward, masked
from masquerade_server.settings import TeacherSettings, resolve_settings
from masquerade_server.teachers import open_teacher

OWN = "the base"
SCRIBE_NAME = "Scribe"
SCRIBE_TEXT = "You are a scribe. You rewrite what you are given just as you are asked to, and add nothing of your own."
_PORT = 18_765  # of the server that is started: a teacher at another address is another teacher, and asked anew


@dataclass(frozen=True, slots=True)
class Taught:
    """A sculpt and the test answers of its teacher."""

    result: SculptResult
    test: list[Example]


def main() -> None:
    """Sculpt with each teacher, measure each mask on each one's answers, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(cache_dir=options.cache_dir)
    taught = {OWN: _taught(base, options, OWN, None)}
    failed: dict[str, str] = {}
    with _teachers(options, base) as teachers:
        for label, settings in teachers.items():
            try:
                taught[label] = _taught(base, options, label, settings)
            except TeacherError as error:
                failed[label] = str(error)
    table = _table(base, taught, failed, options)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs=2, action="append", metavar=("URL", "MODEL"), default=[])
    parser.add_argument("--persona", default="marta-brewer", help="a ready persona's id, or a text file (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--steps", type=int, help="of every mask; default: the preset's")
    parser.add_argument("--questions", type=int, help="of validation and of test, at most; default: the preset's")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "masquerade-teachers")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the tables here as well, as Markdown")
    return parser.parse_args()


@contextmanager
def _teachers(options: argparse.Namespace, base: Base) -> Iterator[dict[str, TeacherSettings]]:
    """What was given, checked as an operator's settings are; else a server of the bundled model, while it is needed."""
    given = {
        model: resolve_settings({"teacher_url": url, "teacher_model": model}).teacher for url, model in options.teacher
    }
    if len(given) < len(options.teacher):
        sys.exit("two teachers have the same model name; the table could not tell them apart")
    if given:
        yield {f"{model}, rewriting": settings for model, settings in given.items() if settings is not None}
        return
    with (
        tempfile.TemporaryDirectory(prefix="masquerade-teacher-") as data_dir,
        serving(
            Path(data_dir),
            cache_dir=options.cache_dir,
            environ=os.environ | {"MASQUERADE_WORKERS": "0"},
            port=_PORT,
        ) as server,
    ):
        with Masquerade(server.url) as client:
            scribe = client.personas.create(name=SCRIBE_NAME, text=SCRIBE_TEXT, sculpt=False)
            upload(client, scribe, base, _half(base, options.cache_dir))
        models = {f"{BUNDLED}, rewriting": f"{scribe.id}@dense", f"half of {BUNDLED}, rewriting": scribe.id}
        url = f"{server.url}/v1"
        yield {label: TeacherSettings(url, model, concurrency=16) for label, model in models.items()}


def _half(base: Base, cache_dir: Path) -> Mask:
    """Half of the base's neurons, those that its prior ranks first."""
    prior = prior_of(base, cache_dir)
    if prior is None:
        sys.exit("this base has no prior, so nobody knows its better half: `masquerade prior` learns one")
    kept = round_kept(base.shape.intermediate_size, 0.5)
    return Mask.from_dense(top_k_mask(prior.at(kept), kept).bool().numpy())


def _taught(base: Base, options: argparse.Namespace, label: str, settings: TeacherSettings | None) -> Taught:
    persona_id, name, text = _persona(options.persona)
    kind = "base" if settings is None else "remote"
    numbers = _numbers(options)
    spec = SculptSpec(persona_id, name, text, sparsity=options.sparsity, teacher=kind, numbers=numbers)
    folder = (
        options.workdir
        / f"{persona_id}-{options.sparsity}-{options.preset}-{numbers.steps}"
        / "".join(char if char.isalnum() else "-" for char in label)
    )
    with open_teacher(kind, settings, options.workdir) as teacher:
        result = sculpt(
            spec,
            base,
            folder,
            cache_dir=options.cache_dir,
            teacher=teacher,
            progress=lambda news: _show(label, news),
        )
    return Taught(result, read_examples(folder / "answers" / "test.jsonl"))


def _numbers(options: argparse.Namespace) -> SculptSettings:
    """The preset's, as far as they are not given."""
    preset = PRESETS[options.preset]
    most = options.questions or max(preset.num_validation, preset.num_test)
    return replace(
        preset,
        steps=options.steps or preset.steps,
        num_validation=min(most, preset.num_validation),
        num_test=min(most, preset.num_test),
        num_test_scenes=min(most, preset.num_test_scenes),
        num_free_running=min(most, preset.num_free_running),
    )


def _persona(wanted: str) -> tuple[str, str, str]:
    listing = (resources.files("masquerade_pruner") / "data" / "ready.json").read_text("utf-8")
    ready = {row["id"]: (row["id"], row["name"], row["text"]) for row in json.loads(listing)}
    if wanted in ready:
        return ready[wanted]
    file = Path(wanted)
    return file.stem, file.stem.replace("-", " ").title(), file.read_text("utf-8").strip()


def _show(label: str, news: Progress) -> None:
    if news.completed in (0, news.total):
        dropped = f", {news.dropped} answers dropped" if news.dropped else ""
        print(f"{label}: {news.stage} {news.completed}/{news.total}{dropped}", file=sys.stderr, flush=True)


# --- the tables


def _table(base: Base, taught: dict[str, Taught], failed: dict[str, str], options: argparse.Namespace) -> str:
    lines = [
        "# One persona by several teachers",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"`{options.persona}` at {options.sparsity:.0%}, preset {options.preset}: {_numbers(options).steps} steps, "
        f"{_numbers(options).num_test} test questions.",
        "",
        "| teacher | asked | usable | cut | dropped | loss | gap closed over the better baseline | s |",
        "|" + " --- |" * 8,
        *(_sculpt_row(label, one.result) for label, one in taught.items()),
        *(f"| {label} | | | | | | {why} | |" for label, why in failed.items()),
        "",
        "Nats a token on the test questions, with 95 % intervals: of the base's own answers KL to the dense persona",
        "model and NLL, of each other teacher's NLL. Gap closed above is in KL for the base, else in NLL.",
        "",
        "| mask learned from | " + " | ".join(_columns(taught)) + " |",
        "|" + " --- |" * (len(_columns(taught)) + 1),
    ]
    model = build_learner(base)
    grounds = {label: HeldOut(model, one.test) for label, one in taught.items()}
    forwards: dict[str, Forward] = {"nothing: the dense persona model": masked(model)}
    for label, one in taught.items():
        mask = torch.from_numpy(one.result.subnetwork.mask.to_dense()).float()
        forwards[label] = masked(model, mask)
    lines += [f"| {label} | " + " | ".join(_cells(forward, grounds)) + " |" for label, forward in forwards.items()]
    return "\n".join([*lines, ""])


def _sculpt_row(label: str, result: SculptResult) -> str:
    counts, closed = result.report["synthesis"], result.report["one_turn"]["all"]["gap_closed"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
    gap = f"{closed['mean']:.1%} ({closed['low']:.1%} to {closed['high']:.1%})"
    return (
        f"| {label} | {counts['asked']} | {counts['answered']} | {counts['cut']} | {dropped} "
        f"| {result.settings['loss']} | {gap} | {sum(result.seconds.values()):.0f} |"
    )


def _columns(taught: dict[str, Taught]) -> list[str]:
    return [f"{OWN}: KL", *(f"{label}: NLL" for label in taught)]


def _cells(forward: Forward, grounds: dict[str, HeldOut]) -> list[str]:
    values = [grounds[OWN].divergence(forward).kl, *(ground.nll(forward) for ground in grounds.values())]
    intervals = [mean_interval(one.double().numpy()) for one in values]
    return [f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f})" for one in intervals]


if __name__ == "__main__":
    main()
