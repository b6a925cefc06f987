"""How long until a server answers: from a fresh clone through `make serve`, and on later starts.

    python benchmarks/startup.py                       # later starts alone
    python benchmarks/startup.py --fresh .             # a fresh clone of the repository here, then later starts
    python benchmarks/startup.py --fresh URL --starts 10

A start is timed from just before its process to the first 200 of /readyz, looked at every 50 ms, and on to the first
token of a ready persona and to the end of its reply. Later starts find the base in the cache of the data directory, and
its files in the system's page cache. A fresh clone (what is committed, and nothing else) has a virtual environment and
a data directory of its own; pip's cache is the user's. Downloads are told apart by pip's own log.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from machine import machine
from serving import Line, Server, serving

from masquerade_client import Masquerade

_SERVE = re.compile(r"/masquerade serve\b")  # make's echo of the command: the set-up is over
_PIP_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3})\s+(.*)")
_REPLY_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds from its process."""

    ready: float
    first_token: float
    reply: float
    spoke: str  # whom the reply is by: model and system_fingerprint


@dataclass(frozen=True, slots=True)
class FreshStart:
    """A start from a fresh clone."""

    clone: float  # seconds of `git clone`
    steps: tuple[tuple[str, float], ...]  # make's own lines before the server, and seconds until the next
    downloads: tuple[float, ...]  # seconds of each
    start: Start

    @property
    def set_up(self) -> float:
        """Seconds from `make serve` to the server's process."""
        return sum(seconds for _, seconds in self.steps)


def main() -> None:
    """Start, time, stop; print, write."""
    options = _options()
    sections = [_fresh_section(fresh_start(options.fresh))] if options.fresh else []
    if options.starts:
        sections.append(_later_section(*later_starts(options.starts)))
    head = f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}"
    table = "\n\n".join(["# From start to answer", head, *sections]) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", metavar="CLONE_FROM", help="clone this repository (path or URL) and `make serve`")
    parser.add_argument("--starts", type=int, default=5, help="later starts; 0: none (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def fresh_start(source: str) -> FreshStart:
    """Clone, `make serve`, chat, stop; nothing is left behind but what pip caches."""
    with tempfile.TemporaryDirectory(prefix="masquerade-fresh-") as name:
        folder = Path(name)
        clone, pip_log = folder / "clone", folder / "pip.log"
        began = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", source, clone], check=True)
        cloned = time.perf_counter() - began
        environ = _outside_environ() | {"PIP_LOG": str(pip_log)}
        data_dir = folder / "data"
        with serving(data_dir, command=["make", "serve"], cwd=clone, environ=environ, timeout_s=3600) as server:
            start = first_chat(server)
            steps = tuple(_steps(server))
        return FreshStart(cloned, steps, tuple(_downloads(pip_log)), start)


def later_starts(count: int) -> tuple[Start, list[Start]]:
    """The start that fills the cache, and those after it."""
    with tempfile.TemporaryDirectory(prefix="masquerade-starts-") as name:
        starts = [_start(Path(name)) for _ in range(1 + count)]
    return starts[0], starts[1:]


def _start(data_dir: Path) -> Start:
    with serving(data_dir) as server:
        start = first_chat(server)
    print(f"ready after {start.ready:.2f} s", file=sys.stderr, flush=True)
    return start


def first_chat(server: Server) -> Start:
    """Chat with a ready persona, or with the base where none is ready."""
    with Masquerade(server.url) as client:
        personas = (persona.id for persona in client.personas.list() if persona.serving == "mask")
        model = next(personas, None) or client.server.ready().model or ""
        reply = client.chat.stream(model, "What should I know about you?", max_tokens=_REPLY_TOKENS)
        next(reply)  # the stream opens with the first token
        first = time.perf_counter()
        whole = reply.result()
        ended = time.perf_counter()
    spoke = f"{model} ({whole.system_fingerprint})"
    return Start(server.ready_s, first - server.started, ended - server.started, spoke)


def _outside_environ() -> dict[str, str]:
    """The environment without this virtual environment, this source tree and a make around us."""
    inside = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    environ = {key: value for key, value in os.environ.items() if key not in inside}
    own = str(Path(sys.executable).parent) if sys.prefix != sys.base_prefix else None
    folders = [one for one in environ["PATH"].split(os.pathsep) if own is None or os.path.abspath(one) != own]
    return environ | {"PATH": os.pathsep.join(folders)}


def _steps(server: Server) -> Iterator[tuple[str, float]]:
    """What the Makefile said before the server ("Installing torch (...) ..."), and how long until it spoke again."""
    lines: list[Line] = [(server.started, "make")]
    for moment, text in server.lines:
        if text.endswith("...") or _SERVE.search(text):
            lines.append((moment, re.sub(r" \(.*\)", "", text).removesuffix(" ...")))
        if _SERVE.search(text):
            break
    for (moment, text), (until, _) in pairwise(lines):
        yield text, until - moment


def _downloads(pip_log: Path) -> Iterator[float]:
    """Seconds of each download of a file or an index page: pip logs its beginning, then nothing until it is over."""
    lines = [found.groups() for line in _log_lines(pip_log) if (found := _PIP_LINE.match(line))]
    for (stamp, text), (until, _) in pairwise(lines):
        if text.startswith(("Downloading ", "Getting page http")):
            yield (datetime.fromisoformat(until) - datetime.fromisoformat(stamp)).total_seconds()


def _log_lines(path: Path) -> list[str]:
    return path.read_text("utf-8", "replace").splitlines() if path.is_file() else []


def _fresh_section(fresh: FreshStart) -> str:
    start, downloads = fresh.start, sum(fresh.downloads)
    lines = [
        "## A fresh clone",
        "",
        f"`git clone` {fresh.clone:.1f} s, then `make serve`; the reply is by {start.spoke}.",
        "",
        "| from `make serve` to | s | of it downloads | beside them |",
        "| --- | --- | --- | --- |",
    ]
    moments = {
        "the server's process (set-up)": fresh.set_up,
        "/readyz": start.ready,
        "first token": start.first_token,
        "first reply": start.reply,
    }
    lines += [f"| {name} | {s:.1f} | {downloads:.1f} | {s - downloads:.1f} |" for name, s in moments.items()]
    share = fresh.set_up / start.reply
    num_downloads = len(fresh.downloads)
    lines += ["", f"The set-up is {share:.0%} of it, with {num_downloads} downloads (files and index pages):", ""]
    lines += ["| step | s |", "| --- | --- |", *(f"| {text} | {seconds:.1f} |" for text, seconds in fresh.steps)]
    return "\n".join(lines)


def _later_section(first: Start, later: list[Start]) -> str:
    lines = [
        "## Later starts",
        "",
        f"{len(later)} starts of `masquerade serve` after one that filled the cache; replies by {first.spoke}.",
        "",
        "| from process start to | median s | max s | filling the cache, s |",
        "| --- | --- | --- | --- |",
    ]
    for name, field in (("/readyz", "ready"), ("first token", "first_token"), ("first reply", "reply")):
        values = [getattr(start, field) for start in later]
        lines.append(f"| {name} | {np.median(values):.2f} | {max(values):.2f} | {getattr(first, field):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
