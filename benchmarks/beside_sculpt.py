"""Time per output token of a chat, alone on the server and beside a running sculpt.

    python benchmarks/beside_sculpt.py                                # default sculpt, continuous chats
    python benchmarks/beside_sculpt.py --pause 3                      # a player who reads before answering
    python benchmarks/beside_sculpt.py --preset smoke --chats 2 --idle-chats 1 --tokens 16   # a try-out

Chats of one ready persona, one after the other: alone, then in the answer and in the learn stage of a sculpt that
`POST /personas` started, then alone again after it was cancelled. While chats are active the worker takes one thread;
it notices within half a second, so the first chat after an idle time, when it still has all of them, is reported apart.
A chat counts for a stage where the job was in that stage before and after it. Ratios are to the chats alone, before
and after together.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from machine import machine
from masked_persona import masked_persona
from replies import TimedReply, question, timed_reply
from serving import CACHE_DIR, serving

from masquerade_client import Job, Masquerade

_TEXTS = Path(__file__).resolve().parent.parent / "examples" / "personas"
_LOOK_S = 0.5  # between two looks at the job
_WARM_UP = 2  # chats before the first that counts
_ALONE = ("alone, before", "alone, after")

Stage = Callable[[], str | None]  # what is running now
Preset = Literal["smoke", "default", "thorough"]


@dataclass(frozen=True, slots=True)
class Talk:
    """How chats are held."""

    client: Masquerade
    persona_id: str
    num_chats: int
    num_tokens: int
    pause_s: float
    num_idle_chats: int
    idle_s: float
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def chat(self) -> TimedReply:
        """One chat, with a question of its own."""
        return timed_reply(self.client, self.persona_id, question(next(self.numbers)), num_tokens=self.num_tokens)


@dataclass(slots=True)
class Chats:
    """The chats of one stage."""

    after_idle: list[TimedReply] = field(default_factory=list)
    steady: list[TimedReply] = field(default_factory=list)


def main() -> None:
    """Chat alone, beside a sculpt, and alone again; print, write."""
    options = _options()
    chats: dict[str, Chats] = {name: Chats() for name in (_ALONE[0], *options.stages, _ALONE[1])}
    with (
        tempfile.TemporaryDirectory(prefix="masquerade-beside-") as name,
        serving(Path(name), cache_dir=options.cache_dir) as server,
        Masquerade(server.url, max_retries=0) as client,
    ):
        persona = masked_persona(client, options.cache_dir)
        talk = Talk(client, persona.id, options.chats, options.tokens, options.pause, options.idle_chats, options.idle)
        for _ in range(_WARM_UP):
            talk.chat()
        for file in itertools.islice(itertools.cycle(options.personas), options.rounds):
            _round(talk, file, options.preset, options.stages, chats)
    table = _table(chats, talk, options.preset)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = sorted(_TEXTS.glob("*.txt"))
    parser.add_argument("--personas", nargs="+", type=Path, default=texts, help="texts to sculpt, one a round")
    parser.add_argument("--rounds", type=int, default=1, help="alone, sculpt, alone (%(default)s)")
    parser.add_argument(
        "--preset", choices=("smoke", "default", "thorough"), default="default", help="of the sculpt (%(default)s)"
    )
    stages = ("select", "answer", "learn", "evaluate")
    parser.add_argument("--stages", nargs="+", choices=stages, default=["answer", "learn"])
    parser.add_argument("--chats", type=int, default=20, help="in each stage and round (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each chat (%(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two chats (%(default)s)")
    parser.add_argument("--idle-chats", type=int, default=3, help="chats after an idle time, each stage (%(default)s)")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of that idle time (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def _round(talk: Talk, file: Path, preset: Preset, stages: Sequence[str], chats: dict[str, Chats]) -> None:
    _hold(talk, lambda: None, None, chats[_ALONE[0]])
    name = file.stem.replace("-", " ").title()
    text = file.read_text("utf-8").strip()
    sculpted = talk.client.personas.create(name=name, text=text, preset=preset).id
    for stage in stages:
        _wait_for(talk.client, sculpted, stage)
        _hold(talk, lambda: _job(talk.client, sculpted).stage, stage, chats[stage])
    _cancel(talk.client, sculpted)
    _hold(talk, lambda: None, None, chats[_ALONE[1]])


def _hold(talk: Talk, running: Stage, wanted: str | None, chats: Chats) -> None:
    """Chat for as long as the wanted stage runs, at most as often as asked for."""
    for number in range(talk.num_idle_chats + talk.num_chats):
        is_idle = number < talk.num_idle_chats
        time.sleep(talk.idle_s if is_idle else talk.pause_s)
        if running() != wanted:
            break
        reply = talk.chat()
        if running() == wanted:
            (chats.after_idle if is_idle else chats.steady).append(reply)
    _say(f"{wanted or 'alone'}: {len(chats.steady)} chats, {len(chats.after_idle)} after an idle time")


def _job(client: Masquerade, persona_id: str) -> Job:
    job = client.personas.get(persona_id).job
    assert job is not None
    return job


def _wait_for(client: Masquerade, persona_id: str, stage: str) -> None:
    """Until the stage has done something, or is over. Exits where the sculpt ended."""
    _say(f"waiting for the {stage} stage")
    order = ("select", "answer", "learn", "evaluate")
    for look in itertools.count():
        job = _job(client, persona_id)
        if job.ended:
            sys.exit(f"the sculpt {job.status} before its {stage} stage: {job.error or 'no reason given'}")
        if job.stage in order and order.index(job.stage) > order.index(stage):
            return
        if job.stage == stage and job.completed:
            return
        if look % 60 == 0:
            _say(f"the sculpt is {job.status}: {job.stage or 'no stage yet'} {job.completed}/{job.total}")
        time.sleep(_LOOK_S)


def _cancel(client: Masquerade, persona_id: str) -> None:
    if _job(client, persona_id).ended:
        return
    began = time.perf_counter()
    client.personas.cancel(persona_id)
    while not _job(client, persona_id).ended:
        time.sleep(_LOOK_S / 10)
    _say(f"cancelled within {time.perf_counter() - began:.1f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the table


def _table(chats: dict[str, Chats], talk: Talk, preset: str) -> str:
    lines = [
        "# A chat beside a sculpt",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"Chats of {talk.num_tokens} tokens with {talk.persona_id}, one at a time, {talk.pause_s:g} s between them;",
        f"a {preset} sculpt. TPOT (milliseconds) over chats; gaps are between two chunks of any of them.",
        "",
        "| beside | chats | TPOT p50 | p90 | p99 | ratio p50 | p90 | p99 | gap p99 | max | TTFT p50 | max |",
        "|" + " --- |" * 12,
    ]
    lines += _rows({name: one.steady for name, one in chats.items()})
    lines += [
        "",
        f"The first chat after {talk.idle_s:g} s without any, in which the worker took all threads:",
        "",
        *lines[7:9],
        *_rows({name: one.after_idle for name, one in chats.items()}),
    ]
    return "\n".join([*lines, ""])


def _rows(chats: dict[str, list[TimedReply]]) -> list[str]:
    alone = [reply for name in _ALONE for reply in chats[name]]
    quiet = _tpot(alone) if alone else [float("nan")] * 3
    return [_row(name, replies, quiet) for name, replies in chats.items()]


def _row(name: str, replies: Sequence[TimedReply], quiet: Sequence[float]) -> str:
    if not replies:
        return f"| {name} | 0 |" + " |" * 10
    tpot = _tpot(replies)
    ratios = [f"{one / other:.2f}" for one, other in zip(tpot, quiet, strict=True)]
    gaps = np.percentile([gap for reply in replies for gap in reply.gaps()], (99, 100))
    first = np.percentile([reply.ttft_s for reply in replies], (50, 100))
    times = [f"{1000 * seconds:.1f}" for seconds in (*tpot, *gaps, *first)]
    return f"| {name} | {len(replies)} | " + " | ".join([*times[:3], *ratios, *times[3:]]) + " |"


def _tpot(replies: Sequence[TimedReply]) -> list[float]:
    """p50, p90, p99 in seconds."""
    return [float(one) for one in np.percentile([reply.tpot_s for reply in replies], (50, 90, 99))]


if __name__ == "__main__":
    main()
