"""Time to first token, and memory, with many registered personas; through real servers over HTTP.

    python benchmarks/first_tokens.py --out benchmarks/results/first_tokens.md
    python benchmarks/first_tokens.py --personas 200 --repeats 10        # a try-out

Two servers run side by side and are asked in turn: one with 16 registered personas, one with 10,000, each persona with
a random mask of its own at 50 % and a prompt of about 170 tokens; questions have 30. One request at a time, two tokens
of answer. The personas are registered in the data directory before the servers start, once, and kept for later runs.

warmed / cold: one persona after another, whose weights the server has met; first its prompt is new to the server, then
    only the question is.
misses, many / few: any registered persona, its text just changed (the mask kept), so that no prompt is cached.
never served / base: personas that this server has not met, under their own masks and on the unpruned base (id@dense),
    in turn: both prompts are new, and of the first the mask is read as well.
idle memory: resident memory of a server with many, once it is idle, less that of one with few, over the difference in
    personas and over the packed bits of one mask; several starts of each, since a process's memory differs by some
    50 MiB from start to start.

Before each request the server is left alone until it is idle: packs it makes in the background are not what is timed.
Exit status 1 where a figure misses what it must reach.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import psutil
import torch
from intervals import percentile_ratio
from machine import machine
from replies import TimedReply, timed_reply
from serving import CACHE_DIR, serving
from town import PROMPT_TOKENS, QUESTION_TOKENS, character, random_subnetwork

from masquerade_client import Masquerade
from masquerade_engine import Base, load_base
from masquerade_engine.prompt import prompt_sha256
from masquerade_engine.threads import available_cores
from masquerade_masks import MaskFile, MaskHeader, PersonaFiles, SQLiteRegistry
from masquerade_pruner.bootstrap import Interval, mean_interval
from masquerade_server.bench.workload import question
from masquerade_server.publishing import Publication, register

_SPARSITY = 0.5
_ANSWER_TOKENS = 2
_CHANCE = 40  # prompt tokens in which two texts may begin alike, of a prompt that counts as not cached
_LOOK_S, _IDLE_SHARE, _IDLE_LIMIT_S = 0.2, 0.1, 30.0
_SETTLE_S, _SETTLE_LIMIT_S = 3.0, 90.0


# --- personas before the server starts


def registered(base: Base, count: int, folder: Path) -> Path:
    """A data directory with `count` personas and nothing else; made on the first call."""
    kept = folder / f"registered-{base.fingerprint[:16]}-{count}"
    if not kept.is_dir():
        made = Path(tempfile.mkdtemp(prefix=".registering-", dir=folder))
        files = PersonaFiles(made)
        # What is made here is made again where power fails.
        with SQLiteRegistry(made / "registry.sqlite") as registry, mock.patch("os.fsync"):
            for number in range(count):
                register(registry, files, _publication(base, number), name=_id(number), base=base.fingerprint)
                if (number + 1) % 1000 == 0:
                    _say(f"registered {number + 1} of {count} personas")
        made.rename(kept)
    return kept


def _publication(base: Base, number: int) -> Publication:
    one = character(base, number)
    header = MaskHeader(_id(number), 1, "none", prompt_sha256(one.system_prompt))
    content = MaskFile(random_subnetwork(base, _SPARSITY, number), header)
    return Publication(_id(number), one.text, one.system_prompt, content, "upload")


def _id(number: int) -> str:
    return f"persona-{number:05d}"


# --- asking


@dataclass(slots=True)
class Town:
    """A running server and its registered personas."""

    client: Masquerade
    url: str
    process: psutil.Process
    base: Base
    size: int
    unmet: list[str]  # personas that nobody has asked anything, in random order
    rng: random.Random
    _num_asked: int = field(default=0)

    def first_token(self, model: str, *, cached: bool) -> float:
        """TTFT in seconds of one question. Exits where the prompt was not as cached as it should be."""
        self._num_asked += 1
        text = question(QUESTION_TOKENS, f"{self.size}/{self._num_asked}")
        self.wait_until_idle()
        reply = timed_reply(self.client, model, text, num_tokens=_ANSWER_TOKENS)
        _check_cached(model, reply, cached)
        return reply.ttft_s

    def meet(self, persona: str) -> None:
        """Have the server read a persona's mask and use it, without its prompt."""
        body = {"model": persona, "prompt": [1, 2, 3], "max_tokens": 1}
        httpx.post(f"{self.url}/v1/completions", json=body, timeout=60.0).raise_for_status()

    def anyone(self) -> str:
        """A persona, with a text that the server has not seen."""
        persona = _id(self.rng.randrange(self.size))
        text = character(self.base, f"{self.size}/{persona}/{self._num_asked}").text
        self.client.personas.update(persona, text=text, sculpt=False)
        return persona

    def stranger(self) -> str:
        """A persona that the server has not met, each once."""
        if not self.unmet:
            sys.exit(f"{self.size} personas are too few for this many requests; lower --repeats")
        return self.unmet.pop()

    def wait_until_idle(self) -> None:
        """Until the server uses next to no processor."""
        deadline = time.monotonic() + _IDLE_LIMIT_S
        while time.monotonic() < deadline:
            before = _cpu_s(self.process)
            time.sleep(_LOOK_S)
            if _cpu_s(self.process) - before < _IDLE_SHARE * _LOOK_S:
                return

    def settled_memory(self) -> int:
        """Resident bytes once nothing changes any more: packs and prompts are made ready after the start."""
        deadline = time.monotonic() + _SETTLE_LIMIT_S
        before = -1
        while (now := int(self.process.memory_info().rss)) != before and time.monotonic() < deadline:
            before = now
            self.wait_until_idle()
            time.sleep(_SETTLE_S)
        return now


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _check_cached(model: str, reply: TimedReply, cached: bool) -> None:
    found = reply.num_cached_tokens
    if cached != (found > PROMPT_TOKENS // 2) or (not cached and found > _CHANCE):
        sys.exit(f"{found} prompt tokens of {model} were cached, where {'most' if cached else 'none'} should have been")


@contextmanager
def town(base: Base, count: int, options: argparse.Namespace) -> Iterator[Town]:
    """A server with `count` registered personas, on a copy of their data directory."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="masquerade-first-tokens-")))
        shutil.copytree(registered(base, count, options.cache_dir), folder / "data")
        environ = os.environ | {"MASQUERADE_WORKERS": "0"}
        data_dir = folder / "data"
        server = stack.enter_context(serving(data_dir, cache_dir=options.cache_dir, environ=environ, timeout_s=600))
        client = stack.enter_context(Masquerade(server.url, max_retries=0))
        rng = random.Random(count)
        # Those that come first by id are prepared when the server starts.
        unmet = [_id(number) for number in range(min(count // 2, 100), count)]
        rng.shuffle(unmet)
        yield Town(client, server.url, psutil.Process(server.pid), base, count, unmet, rng)


# --- figures


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table."""

    name: str
    interval: Interval
    most: float  # that it may be
    detail: str

    @property
    def reached(self) -> bool:
        return self.interval.mean <= self.most


def main() -> None:
    """Register, serve, ask, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    base = load_base(cache_dir=options.cache_dir)
    figures = [idle_memory(base, options)]
    with town(base, options.few, options) as few, town(base, options.personas, options) as many:
        few.first_token(base.name, cached=False)  # the first request of a process pays for what others do not
        many.first_token(base.name, cached=False)
        figures += [warmed_over_cold(many, options.repeats), never_served(many, options.repeats)]
        figures.append(misses(few, many, 2 * options.repeats))  # last: it meets strangers
    table = _table(figures, options)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")
    sys.exit(0 if all(figure.reached for figure in figures) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=10_000, help="registered at the large server (%(default)s)")
    parser.add_argument("--few", type=int, default=16, help="registered at the small one (%(default)s)")
    parser.add_argument("--repeats", type=int, default=100, help="of each figure; of the misses twice (%(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="of each server, for memory (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds base and personas (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def idle_memory(base: Base, options: argparse.Namespace) -> Figure:
    """Bytes that one more registered persona takes, over the bytes of its packed mask."""
    found: dict[int, list[int]] = {options.few: [], options.personas: []}
    for number in range(options.starts):
        for size, resident in found.items():
            with town(base, size, options) as one:
                resident.append(one.settled_memory())
            _say(f"start {number + 1} of {options.starts}: {size} personas, {resident[-1] / 2**20:.0f} MiB resident")
    mask = random_subnetwork(base, _SPARSITY, 0).mask.bits.nbytes
    small, large = (np.array(resident, np.float64) for resident in found.values())
    each = mean_interval((large - small) / (options.personas - options.few) / mask)
    detail = (
        f"{np.median(large) / 2**20:.0f} MiB resident against {np.median(small) / 2**20:.0f}, {options.starts} starts "
        f"each; a mask has {mask} bytes"
    )
    return Figure("idle memory, of a mask's bytes", each, 4.0, detail)


def warmed_over_cold(town: Town, repeats: int) -> Figure:
    """The same persona's prompt, new to the server and then known."""
    cold, warmed = [], []
    for number in range(repeats):
        persona = town.stranger()
        town.meet(persona)
        cold.append(town.first_token(persona, cached=False))
        warmed.append(town.first_token(persona, cached=True))
        _count("warmed / cold", number, repeats)
    return Figure("warmed / cold, p50", percentile_ratio(warmed, cold, 50), 0.35, _against(warmed, cold))


def misses(few: Town, many: Town, repeats: int) -> Figure:
    """Prompts that are not cached, at either server in turn."""
    small, large = [], []
    for number in range(repeats):
        small.append(few.first_token(few.anyone(), cached=False))
        large.append(many.first_token(many.anyone(), cached=False))
        _count("misses", number, repeats)
    name = f"misses, {many.size:,} personas / {few.size}, p99"
    return Figure(name, percentile_ratio(large, small, 99), 1.2, _against(large, small))


def never_served(town: Town, repeats: int) -> Figure:
    """Personas new to the process against the unpruned base under prompts as new."""
    masked, dense = [], []
    for number in range(repeats):
        masked.append(town.first_token(town.stranger(), cached=False))
        dense.append(town.first_token(f"{town.stranger()}@dense", cached=False))
        _count("never served / base", number, repeats)
    return Figure("never served / base, p50", percentile_ratio(masked, dense, 50), 1.1, _against(masked, dense))


def _against(ours: Sequence[float], theirs: Sequence[float]) -> str:
    p50, p99 = (
        " against ".join(f"{1000 * float(np.percentile(one, percent)):.1f}" for one in (ours, theirs))
        for percent in (50, 99)
    )
    return f"p50 {p50} ms, p99 {p99} ms, {len(ours)} each"


def _table(figures: Sequence[Figure], options: argparse.Namespace) -> str:
    lines = [
        "# First tokens, and memory, with many registered personas",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"{options.few} and {options.personas:,} registered personas with masks at {_SPARSITY:.0%}; prompts of about",
        f"{PROMPT_TOKENS} tokens of persona and {QUESTION_TOKENS} of question; one request at a time, over HTTP.",
        "",
        "| figure | ratio | 95 % interval | at most | | |",
        "|" + " --- |" * 6,
    ]
    for one in figures:
        interval, verdict = one.interval, "reached" if one.reached else "**missed**"
        between = "" if interval.low == interval.high else f"{interval.low:.3f} to {interval.high:.3f}"
        lines.append(f"| {one.name} | {interval.mean:.3f} | {between} | {one.most:g} | {verdict} | {one.detail} |")
    return "\n".join([*lines, ""])


def _count(name: str, number: int, total: int) -> None:
    if (number + 1) % 25 == 0:
        _say(f"{name}: {number + 1} of {total}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
