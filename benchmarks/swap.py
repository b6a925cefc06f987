"""From publishing a version to the first token of it, with a stream of the same persona open across every swap.

    python benchmarks/swap.py                         # 20 swaps in each of four ways
    python benchmarks/swap.py --swaps 3 --tokens 96   # a try-out

A mask is published either through `PUT /personas/{id}/mask` or by another process, as a sculpt worker does it: files,
then the registry's row. Either two masks take turns, which the engine soon has met, or each mask is a new one, as after
a sculpt. When it is acknowledged (the PUT's answer; in the other process the registry's
commit) a chat is sent, again and again until its `system_fingerprint` names the new version; its first token is what is
timed. Before each swap the same chat is sent to the old version, for comparison.

The open stream must end on the version it began with, whole; the exit status is 1 where one did not.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from machine import machine
from masked_persona import masked_persona, other_mask
from replies import TimedReply, question, timed_reply
from serving import CACHE_DIR, serving

from masquerade_client import Masquerade
from masquerade_masks import PersonaFiles, SQLiteRegistry, mask_file

_PUT, _IN_TURN = "PUT", "two masks in turn"
_WAYS = (_PUT, "another process")
_MASKS = (_IN_TURN, "a new mask each time")
_ASKED_TOKENS = 4  # of the chats that look which version answers
_FLOWING = 8  # chunks of the open stream before anything is published


@dataclass(frozen=True, slots=True)
class Published:
    """A version and when it was published, in `time.perf_counter` seconds (one clock for all processes)."""

    number: int
    began: float
    acknowledged: float


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap: the publication, the chats around it, and the stream across it."""

    published: Published
    before: TimedReply  # a chat of the old version, beside the stream
    after: TimedReply  # the first chat of the new version
    num_stale: int  # chats sent after the acknowledgement that the old version answered
    stream: TimedReply
    residency: str  # of the new version when the stream had ended: on the dense pack or on one of its own

    @property
    def from_acknowledged_s(self) -> float:
        return self.after.first - self.published.acknowledged

    @property
    def from_began_s(self) -> float:
        return self.after.first - self.published.began

    @property
    def was_across(self) -> bool:
        """Whether the stream was still open when the new version spoke."""
        return self.stream.last > self.after.first

    def disturbance(self, num_tokens: int) -> str | None:
        """What is wrong with the stream."""
        stream = self.stream
        if stream.fingerprints != self.before.fingerprints:
            return f"it names {sorted(map(str, stream.fingerprints))}, not {sorted(map(str, self.before.fingerprints))}"
        if (stream.finish_reason, stream.num_tokens) != ("length", num_tokens):
            return f"it ended with {stream.finish_reason} after {stream.num_tokens} of {num_tokens} tokens"
        return None


Publish = Callable[[bytes], Published]


def main() -> None:
    """Swap in every way, print, write."""
    options = _options()
    series = {f"{way}, {masks}": _series(way, masks, options) for way, masks in itertools.product(_WAYS, _MASKS)}
    table = _table(series, options.tokens)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")
    if any(swap.disturbance(options.tokens) for swaps in series.values() for swap in swaps):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20, help="in each way (%(default)s)")
    parser.add_argument("--tokens", type=int, default=192, help="of the stream across each swap (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def _series(way: str, masks: str, options: argparse.Namespace) -> list[Swap]:
    """Swaps of one kind, on a server of their own: packs of earlier versions would take the memory of later ones."""
    with (
        tempfile.TemporaryDirectory(prefix="masquerade-swap-") as name,
        serving(Path(name), cache_dir=options.cache_dir) as server,
        Masquerade(server.url, max_retries=0) as client,
    ):
        persona = masked_persona(client, options.cache_dir)
        own = mask_file.decode(client.personas.download_mask(persona.id))
        timed_reply(client, persona.id, question(0), num_tokens=_ASKED_TOKENS)
        with _publisher(way, client, server.data_dir, persona.id) as publish:
            swaps = []
            for number in range(options.swaps):
                content = own if masks == _IN_TURN and number % 2 else other_mask(own, _seed(masks, number))
                swaps.append(_swap(client, persona.id, publish, mask_file.encode(content), number, options.tokens))
    print(f"{way}, {masks}: {len(swaps)} swaps", file=sys.stderr, flush=True)
    return swaps


def _seed(masks: str, number: int) -> int:
    return 0 if masks == _IN_TURN else number


# --- publishing


@contextmanager
def _publisher(way: str, client: Masquerade, data_dir: Path, persona_id: str) -> Iterator[Publish]:
    if way == _PUT:
        yield partial(_put, client, persona_id)
    else:
        with publisher(data_dir, persona_id) as publish:
            yield publish


def _put(client: Masquerade, persona_id: str, data: bytes) -> Published:
    began = time.perf_counter()
    persona = client.personas.upload_mask(persona_id, data)
    acknowledged = time.perf_counter()
    assert persona.version is not None
    return Published(persona.version, began, acknowledged)


@contextmanager
def publisher(data_dir: Path, persona_id: str) -> Iterator[Publish]:
    """A process that publishes in the server's data directory without asking the server."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_publish_all, args=(theirs, data_dir, persona_id), daemon=True)
    process.start()
    mine.recv()  # it has imported what it needs

    def publish(data: bytes) -> Published:
        mine.send(data)
        published: Published = mine.recv()
        return published

    try:
        yield publish
    finally:
        mine.send(None)
        process.join(10.0)


def _publish_all(orders: Connection, data_dir: Path, persona_id: str) -> None:
    from masquerade_server.publishing import Publication, publish  # noqa: PLC0415  (in the other process alone)

    files = PersonaFiles(data_dir)
    with SQLiteRegistry(data_dir / "registry.sqlite") as registry:
        orders.send(None)
        while (data := orders.recv()) is not None:
            persona = registry.get_persona(persona_id)
            content = mask_file.decode(data)
            publication = Publication(persona_id, persona.text, persona.system_prompt, content, "sculpt")
            began = time.perf_counter()
            version = publish(registry, files, publication)
            orders.send(Published(version.number, began, time.perf_counter()))


# --- swapping


def _swap(client: Masquerade, persona_id: str, publish: Publish, data: bytes, number: int, num_tokens: int) -> Swap:
    flowing = threading.Event()

    def seen(num_chunks: int) -> None:
        if num_chunks >= _FLOWING:
            flowing.set()

    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(
            timed_reply, client, persona_id, "Tell me a long story.", num_tokens=num_tokens, on_chunk=seen
        )
        while not flowing.wait(0.1):
            if streaming.done():
                streaming.result()
                sys.exit(f"a stream of {num_tokens} tokens came in fewer than {_FLOWING} chunks")
        before = timed_reply(client, persona_id, question(2 * number), num_tokens=_ASKED_TOKENS)
        published = publish(data)
        after, num_stale = _first_of(client, persona_id, published.number, question(2 * number + 1))
        stream = streaming.result()
        residency = client.personas.get(persona_id).residency or "unknown"
        swap = Swap(published, before, after, num_stale, stream, residency)
    if (wrong := swap.disturbance(num_tokens)) is not None:
        print(f"the stream across version {published.number} was disturbed: {wrong}", file=sys.stderr, flush=True)
    elif not swap.was_across:
        print(f"the stream was over before version {published.number} spoke; raise --tokens", file=sys.stderr)
    return swap


def _first_of(client: Masquerade, persona_id: str, version: int, text: str) -> tuple[TimedReply, int]:
    """The first reply of a version, and how many replies of others came before it."""
    deadline = time.perf_counter() + 60.0
    for num_stale in itertools.count():
        reply = timed_reply(client, persona_id, text, num_tokens=_ASKED_TOKENS)
        if all(str(name).startswith(f"v{version}-") for name in reply.fingerprints):
            return reply, num_stale
        if time.perf_counter() > deadline:
            break
    sys.exit(f"version {version} of {persona_id} was published a minute ago and does not answer")


# --- the table


def _table(series: dict[str, list[Swap]], num_tokens: int) -> str:
    lines = [
        "# From publishing to the first token",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        "Seconds to the first token of the new version: from the acknowledgement, and from the moment publishing",
        "began. Beside them the same chat just before, on the old version. Stale: chats sent after the acknowledgement",
        "that the old version answered.",
        "",
        "| published by | swaps | acknowledged: p50 | p90 | max | began: p50 | p90 | max | before: p50 | max | stale |",
        "|" + " --- |" * 11,
    ]
    for way, swaps in series.items():
        cells = [
            *_quantiles([swap.from_acknowledged_s for swap in swaps], 50, 90, 100),
            *_quantiles([swap.from_began_s for swap in swaps], 50, 90, 100),
            *_quantiles([swap.before.ttft_s for swap in swaps], 50, 100),
        ]
        numbers = " | ".join(f"{seconds:.3f}" for seconds in cells)
        lines.append(f"| {way} | {len(swaps)} | {numbers} | {sum(swap.num_stale for swap in swaps)} |")
    lines += [
        "",
        f"Streams of {num_tokens} tokens across the swaps, milliseconds. Both parts of a stream hold a chat beside it:",
        "one of the old version before the swap, one of the new version, with its whole prompt to read, after.",
        "Compact: new versions that had a pack of their own when the stream ended, made in the background beside it.",
        "",
        "| published by | streams | on their own version to the end | open when the new version spoke "
        "| compact | TPOT p50 | longest gap before | from the swap on |",
        "|" + " --- |" * 8,
    ]
    lines += [_stream_row(way, swaps, num_tokens) for way, swaps in series.items()]
    return "\n".join([*lines, ""])


def _stream_row(way: str, swaps: Sequence[Swap], num_tokens: int) -> str:
    whole = sum(swap.disturbance(num_tokens) is None for swap in swaps)
    across = sum(swap.was_across for swap in swaps)
    compact = sum(swap.residency == "compact" for swap in swaps)
    tpot = float(np.median([swap.stream.tpot_s for swap in swaps]))
    earlier = max(gap for swap in swaps for gap in swap.stream.gaps(until=swap.published.began))
    later = max((gap for swap in swaps for gap in swap.stream.gaps(since=swap.published.began)), default=0.0)
    times = " | ".join(f"{1000 * seconds:.1f}" for seconds in (tpot, earlier, later))
    return f"| {way} | {len(swaps)} | {whole} | {across} | {compact} | {times} |"


def _quantiles(values: Sequence[float], *percents: int) -> list[float]:
    return [float(one) for one in np.percentile(values, percents)]


if __name__ == "__main__":
    main()
