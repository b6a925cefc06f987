"""Minutes of a busy world against a real server: chats, publishes, deletes, creations, disconnects; then the books.

    python benchmarks/soak.py --out benchmarks/results/soak.md       # 10 minutes, 200 personas
    python benchmarks/soak.py --dtype fp32                           # the sharper comparison with the solo replay
    python benchmarks/soak.py --minutes 1 --personas 20              # a try-out: too short to judge memory

16 clients talk without a pause to personas of Zipf popularity, each with a random mask at 50 %. Some continue a
conversation, some are ambient chatter (priority 1), some leave in the middle of a reply. Meanwhile masks are published,
and personas deleted and replaced by new ones. Every reply must come whole: exactly the tokens asked for, named by a
version that was published. A persona asked just after its deletion may be unknown, and nothing else may fail.

Transcripts are sampled all along, greedy and seeded in turn, and replayed afterwards on an engine of their own, one at
a time and teacher-forced: after each served token the next is compared. The rule: where the gap between the solo
replay's two likeliest tokens exceeds twice the measured difference, the served token is the likeliest; that difference
is measured on the log-probabilities of all *other* transcripts, so that none can excuse itself. What a seeded
transcript drew must be as likely solo as it was served, within the same bound.

Resident memory is looked at every 5 s. After a warm-up of 40 % of the time, in which caches fill, it must be flat.

Exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from intervals import slope
from machine import machine
from serving import CACHE_DIR, Server, serving
from town import Character, character, random_subnetwork

from masquerade_client import AsyncMasquerade, ChatCompletion, Chunk, MasqueradeError, Message, NotFound, Sampling
from masquerade_engine import (
    Base,
    ChatMessage,
    Engine,
    PersonaFunction,
    Request,
    SamplingParams,
    load_base,
    render_chat,
)
from masquerade_engine.prompt import prompt_sha256
from masquerade_engine.threads import available_cores
from masquerade_masks import MaskFile, MaskHeader, SubNetwork, mask_file
from masquerade_server.bench.workload import question
from masquerade_server.token_bytes import token_bytes

_SPARSITY = 0.5
_LOOK_S = 5.0  # between two looks at memory
_WARM_UP_SHARE = 0.4
_LEAST_LOOKS = 24  # two minutes after the warm-up, below which memory is not judged
_LEAK_MIB_PER_MIN = 2.0  # growth that the interval's lower end must stay below: 120 MiB an hour
_LOGPROBS = 20
# Log-probabilities that differ more than this are no rounding: fp32 measured 1e-3, bf16 up to 0.9 on a logit.
_MOST_DIFFERENCE = {torch.float32: 0.01, torch.bfloat16: 2.0}
_LEAVE_SHARE, _AMBIENT_SHARE, _CONTINUED_SHARE = 0.05, 0.2, 0.3  # of chats
_MOST_FAILURES = 20  # shown


# --- the world


@dataclass(slots=True)
class Inhabitant:
    """A persona as this script has made it."""

    id: str
    character: Character
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """A sampled chat, with the served tokens and their log-probabilities."""

    character: Character
    messages: tuple[Message, ...]
    seed: int | None  # None: greedy
    fingerprint: str
    text: str
    tokens: tuple[Mapping[str, Any], ...]  # OpenAI's logprobs content
    num_prompt_tokens: int


@dataclass(slots=True)
class World:
    """Who lives here, what was published, and what has happened."""

    base: Base
    client: AsyncMasquerade
    options: argparse.Namespace
    rng: random.Random
    inhabitants: list[Inhabitant] = field(default_factory=list)  # by popularity
    published: dict[str, SubNetwork] = field(default_factory=dict)  # by the digest's first 16 hex digits
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB resident
    numbers: Iterator[int] = field(default_factory=count)

    def fail(self, what: str) -> None:
        """Remember a failure; the run goes on."""
        self.failures.append(what)
        if len(self.failures) <= _MOST_FAILURES:
            _say(f"FAILED: {what}")

    async def settle(self) -> Inhabitant:
        """Create a persona and publish its first mask."""
        number = next(self.numbers)
        one = Inhabitant(f"inhabitant-{number}", character(self.base, f"soak/{number}"))
        await self.client.personas.create(name=one.character.name, text=one.character.text, id=one.id, sculpt=False)
        await self.publish(one)
        self.counts["personas created"] += 1
        return one

    async def publish(self, one: Inhabitant) -> None:
        """A new mask for a persona."""
        subnetwork = random_subnetwork(self.base, _SPARSITY, next(self.numbers))
        self.published[subnetwork.digest[:16]] = subnetwork
        header = MaskHeader(one.id, 1, "none", prompt_sha256(one.character.system_prompt))
        await self.client.personas.upload_mask(one.id, mask_file.encode(MaskFile(subnetwork, header)))
        self.counts["masks published"] += 1

    async def replace(self, place: int) -> None:
        """Delete a persona; a new one takes its place in popularity."""
        gone = self.inhabitants[place]
        gone.leaving = True
        await self.client.personas.delete(gone.id)
        self.counts["personas deleted"] += 1
        self.inhabitants[place] = await self.settle()


async def live(world: World, server: Server) -> None:
    """Everything at once, for the time given."""
    options = world.options
    for _ in range(options.personas):
        world.inhabitants.append(await world.settle())
    _say(f"{options.personas} personas are there")
    until = time.monotonic() + 60 * options.minutes
    ranks = [(rank + 1) ** -options.zipf_s for rank in range(options.personas)]
    exchanges = asyncio.Semaphore(0)  # one for each transcript that is due
    async with asyncio.TaskGroup() as tasks:
        for _ in range(options.concurrency):
            tasks.create_task(_chat_on(world, until, ranks, exchanges))
        tasks.create_task(_change(world, until))
        tasks.create_task(_call_for_exchanges(until, 60 * options.minutes / options.transcripts, exchanges))
        tasks.create_task(_watch(world, server, until))


async def _chat_on(world: World, until: float, ranks: Sequence[float], exchanges: asyncio.Semaphore) -> None:
    while time.monotonic() < until:
        (one,) = world.rng.choices(world.inhabitants, ranks)
        if one.leaving:
            await asyncio.sleep(0.01)
            continue
        sampled = not exchanges.locked()
        if sampled:
            await exchanges.acquire()
        try:
            await (_exchange(world, one) if sampled else _chat(world, one))
        except NotFound as error:
            if one.leaving:
                world.counts["asked after their deletion"] += 1
            else:
                world.fail(f"{one.id}: {error}")
        except MasqueradeError as error:
            world.fail(f"{one.id}: {type(error).__name__}: {error}")


def _messages(world: World, number: int) -> list[Message]:
    messages = [Message("user", question(world.rng.randrange(5, 40), f"soak/{number}"))]
    if world.rng.random() < _CONTINUED_SHARE:
        answered = Message("assistant", question(20, f"soak/answer/{number}"))
        messages += [answered, Message("user", question(10, f"soak/again/{number}"))]
    return messages


async def _chat(world: World, one: Inhabitant) -> None:
    rng = world.rng
    num_tokens = rng.randrange(8, 65)
    sampling = Sampling(max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, temperature=rng.choice((0, 0.8)))
    if rng.random() < _AMBIENT_SHARE:
        sampling["priority"] = 1
    leave_after = rng.randrange(1, num_tokens) if rng.random() < _LEAVE_SHARE else None
    async with world.client.chat.stream(one.id, _messages(world, next(world.numbers)), **sampling) as stream:
        if leave_after is not None:
            num_chunks = 0
            async for _ in stream:  # some tokens have no text, so there may be fewer chunks than tokens
                num_chunks += 1
                if num_chunks == leave_after:
                    world.counts["clients that left"] += 1
                    return
        _check_reply(world, one, await stream.result(), num_tokens)
    world.counts["chats"] += 1


def _check_reply(
    world: World, one: Inhabitant, reply: ChatCompletion, num_tokens: int, finish_reason: str = "length"
) -> None:
    written = reply.usage.completion_tokens if reply.usage else None
    if (reply.finish_reason, written) != (finish_reason, num_tokens):
        world.fail(f"{one.id}: {written} of {num_tokens} tokens, finish reason {reply.finish_reason}")
    name = (reply.system_fingerprint or "").rpartition("-")[2]
    if name not in world.published:
        world.fail(f"{one.id} was served by {reply.system_fingerprint}, which was never published")


async def _exchange(world: World, one: Inhabitant) -> None:
    number = next(world.numbers)
    seed = None if len(world.exchanges) % 2 else number
    messages = _messages(world, number)
    sampling = Sampling(max_tokens=world.options.tokens, logprobs=True, top_logprobs=_LOGPROBS)
    sampling["temperature"] = 0.0 if seed is None else 0.8
    if seed is not None:
        sampling["seed"] = seed
    tokens: list[Mapping[str, Any]] = []
    async with world.client.chat.stream(one.id, messages, **sampling) as stream:
        async for chunk in stream:
            tokens += _tokens_of(chunk)
        reply = await stream.result()
    assert reply.usage is not None
    # It may end by itself: its end token is counted, and is none of its text.
    ended = reply.finish_reason == "stop"
    _check_reply(world, one, reply, len(tokens) + ended, "stop" if ended else "length")
    world.counts["chats"] += 1
    world.exchanges.append(
        Exchange(
            one.character,
            tuple(messages),
            seed,
            (reply.system_fingerprint or "").rpartition("-")[2],
            reply.text,
            tuple(tokens),
            reply.usage.prompt_tokens,
        )
    )


def _tokens_of(chunk: Chunk) -> list[Mapping[str, Any]]:
    return list((chunk.logprobs or {}).get("content") or [])


async def _change(world: World, until: float) -> None:
    """Publish, and now and then replace a persona."""
    for number in count():
        await asyncio.sleep(world.options.change_s)
        if time.monotonic() > until:
            return
        place = world.rng.randrange(len(world.inhabitants))
        try:
            await (world.replace(place) if number % 4 == 3 else world.publish(world.inhabitants[place]))
        except MasqueradeError as error:
            world.fail(f"changing {world.inhabitants[place].id}: {type(error).__name__}: {error}")


async def _call_for_exchanges(until: float, every_s: float, exchanges: asyncio.Semaphore) -> None:
    while time.monotonic() < until:
        exchanges.release()
        await asyncio.sleep(every_s)


async def _watch(world: World, server: Server, until: float) -> None:
    process = psutil.Process(server.pid)
    started = time.monotonic()
    while time.monotonic() < until:
        seconds = time.monotonic() - started
        world.memory.append((seconds, process.memory_info().rss / 2**20))
        if len(world.memory) % 6 == 0:
            _say(f"{seconds:.0f} s: {world.counts['chats']} chats, {world.memory[-1][1]:.0f} MiB resident")
        await asyncio.sleep(_LOOK_S)


# --- the replay


@dataclass(frozen=True, slots=True)
class Step:
    """One token of a transcript beside its solo replay."""

    served: int
    logprob_served: float
    logprob_solo: float | None  # of the same token; None where it is not among the likeliest
    likeliest: int  # solo
    gap: float  # to the next
    difference: float  # between served and solo, the largest over the solo replay's two likeliest tokens


@dataclass(frozen=True, slots=True)
class Replay:
    """A transcript's steps, and whether a free solo run wrote the same text."""

    exchange: Exchange
    steps: tuple[Step, ...]
    same_text: bool

    @property
    def difference(self) -> float:
        return max((step.difference for step in self.steps), default=0.0)

    def contradictions(self, bound: float) -> list[str]:
        """What the rule refuses, `bound` being twice the difference measured elsewhere."""
        found = []
        for place, step in enumerate(self.steps):
            if self.exchange.seed is None and step.gap > bound and step.served != step.likeliest:
                found.append(f"token {place} is {step.served}, solo {step.likeliest} by {step.gap:.3f}")
            if step.logprob_solo is not None and abs(step.logprob_served - step.logprob_solo) > max(bound, 1e-3):
                found.append(f"token {place} has {step.logprob_served:.3f}, solo {step.logprob_solo:.3f}")
        return found


def replay_all(world: World) -> list[Replay]:
    """Every transcript on an engine that does nothing else."""
    base = world.base
    bytes_of = token_bytes(base.tokenizer)
    ids = {bytes_of(token): token for token in range(base.config.vocab_size)}
    replays = []
    with Engine(base) as engine:
        for number, exchange in enumerate(world.exchanges):
            function = PersonaFunction(
                world.published[exchange.fingerprint].digest, "solo", world.published[exchange.fingerprint]
            )
            turns = [ChatMessage(one.role, one.content or "") for one in exchange.messages]
            prompt = tuple(render_chat(base.tokenizer, exchange.character.system_prompt, turns))
            if len(prompt) != exchange.num_prompt_tokens:
                world.fail(f"transcript {number}: {exchange.num_prompt_tokens} prompt tokens, solo {len(prompt)}")
                continue
            replays.append(_replay(engine, function, prompt, exchange, ids))
            if (number + 1) % 10 == 0:
                _say(f"replayed {number + 1} of {len(world.exchanges)} transcripts")
    return replays


def _replay(
    engine: Engine,
    function: PersonaFunction,
    prompt: tuple[int, ...],
    exchange: Exchange,
    ids: Mapping[bytes, int],
) -> Replay:
    steps: list[Step] = []
    tokens: list[int] = []
    for served in exchange.tokens:
        token = ids[bytes(served["bytes"])]
        steps.append(_step(engine, function, (*prompt, *tokens), token, served, ids))
        tokens.append(token)
    temperature = 0.0 if exchange.seed is None else 0.8
    free = SamplingParams(max_tokens=max(1, len(tokens)), temperature=temperature, seed=exchange.seed)
    result = engine.generate_all([Request("free", prompt, function, free)])["free"]
    return Replay(exchange, tuple(steps), result.text == exchange.text)


def _step(
    engine: Engine,
    function: PersonaFunction,
    tokens: tuple[int, ...],
    served: int,
    reported: Mapping[str, Any],
    ids: Mapping[bytes, int],
) -> Step:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=_LOGPROBS)
    engine.add(Request("forced", tokens, function, sampling))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    solo = dict(outputs[-1].top_logprobs)
    (first, best), (second, next_best) = sorted(solo.items(), key=lambda item: -item[1])[:2]
    there = {ids[bytes(one["bytes"])]: float(one["logprob"]) for one in reported["top_logprobs"]}
    differences = [abs(there[token] - solo[token]) for token in (first, second) if token in there]
    return Step(
        served, float(reported["logprob"]), solo.get(served), first, best - next_best, max(differences, default=0.0)
    )


def judge(replays: Sequence[Replay], most: float) -> list[str]:
    """What the replays contradict, each by the difference that all others measured."""
    differences = [replay.difference for replay in replays]
    found = [f"log-probabilities differ by {one:.3f} from the solo replay" for one in differences if one > most]
    for number, replay in enumerate(replays):
        elsewhere = max((one for place, one in enumerate(differences) if place != number), default=most)
        for what in replay.contradictions(2 * elsewhere):
            found.append(f"transcript {number} ({'greedy' if replay.exchange.seed is None else 'seeded'}): {what}")
    return found


# --- the books


def main() -> None:
    """Live, replay, judge, print, write."""
    options = _options()
    torch.set_num_threads(available_cores())
    base = load_base(cache_dir=options.cache_dir, dtype=options.dtype)
    environ = os.environ | {"MASQUERADE_WORKERS": "0", "MASQUERADE_DTYPE": options.dtype}
    with (
        tempfile.TemporaryDirectory(prefix="masquerade-soak-") as folder,
        serving(Path(folder), cache_dir=options.cache_dir, environ=environ) as server,
    ):
        world = asyncio.run(_live(base, options, server))
        lines = [line for _, line in server.lines]
    for line in lines:
        if "Traceback" in line or " ERROR " in line:
            world.fail(f"the server's log: {line}")
    replays = replay_all(world)
    for what in judge(replays, _MOST_DIFFERENCE[base.dtype]):
        world.fail(what)
    table = _table(world, replays)
    print(table)
    if options.out:
        options.out.write_text(table, "utf-8")
    sys.exit(1 if world.failures else 0)


async def _live(base: Base, options: argparse.Namespace, server: Server) -> World:
    async with AsyncMasquerade(server.url, max_retries=0) as client:
        world = World(base, client, options, random.Random(options.seed))
        await live(world, server)
        return world


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of chats (%(default)s)")
    parser.add_argument("--personas", type=int, default=200, help="at any time (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="chats at once (%(default)s)")
    parser.add_argument("--zipf-s", type=float, default=1.0, help="exponent of the popularity (%(default)s)")
    parser.add_argument("--change-s", type=float, default=2.0, help="between two publishes or deletes (%(default)s)")
    parser.add_argument("--transcripts", type=int, default=40, help="to sample and replay (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each transcript (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bf16 or fp32, of server and replay (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens, the network's timing aside (%(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR, help="holds the converted base (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here as well, as Markdown")
    return parser.parse_args()


def _table(world: World, replays: Sequence[Replay]) -> str:
    """The books; adds a failure where memory grows."""
    options = world.options
    memory = _memory_row(world)  # may fail
    steps = [step for replay in replays for step in replay.steps]
    greedy = [replay for replay in replays if replay.exchange.seed is None]
    seeded = [replay for replay in replays if replay.exchange.seed is not None]
    flips = sum(step.served != step.likeliest for replay in greedy for step in replay.steps)
    rows = [(name, f"{number}") for name, number in sorted(world.counts.items())]
    rows += [
        ("memory", memory),
        ("transcripts replayed", f"{len(greedy)} greedy, {len(seeded)} seeded; {len(steps)} tokens compared"),
        ("largest difference of log-probabilities", f"{max((one.difference for one in replays), default=0.0):.4f}"),
        ("greedy tokens that are not the solo replay's likeliest", f"{flips}"),
        ("transcripts that a free solo run repeats word for word", _repeated(greedy, seeded)),
        ("failures", f"{len(world.failures)}"),
    ]
    lines = [
        "# A soak",
        "",
        f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}` on {machine()}",
        "",
        f"{options.minutes:g} minutes, {options.personas} personas at a time of Zipf popularity "
        f"(s = {options.zipf_s:g}), {options.concurrency} chats at once; {world.base.name}, "
        f"{str(world.base.dtype).removeprefix('torch.')}.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    if world.failures:
        lines += ["", *(f"- {failure}" for failure in world.failures[:_MOST_FAILURES])]
    return "\n".join([*lines, ""])


def _memory_row(world: World) -> str:
    warm_s = 60 * world.options.minutes * _WARM_UP_SHARE
    looks = [(seconds, mib) for seconds, mib in world.memory if seconds >= warm_s]
    if len(looks) < _LEAST_LOOKS:
        mib = world.memory[-1][1] if world.memory else float("nan")
        return f"{mib:.0f} MiB resident at the end; too short a run to judge its growth"
    growth = slope([seconds / 60 for seconds, _ in looks], [mib for _, mib in looks])
    text = (
        f"{looks[0][1]:.0f} MiB resident after the warm-up, {looks[-1][1]:.0f} at the end; "
        f"{growth.mean:+.2f} MiB a minute ({growth.low:+.2f} to {growth.high:+.2f})"
    )
    if growth.low > _LEAK_MIB_PER_MIN:
        world.fail(f"memory grows: {text}")
    return text


def _repeated(greedy: Sequence[Replay], seeded: Sequence[Replay]) -> str:
    return ", ".join(
        f"{sum(replay.same_text for replay in replays)} of {len(replays)} {name}"
        for name, replays in (("greedy", greedy), ("seeded", seeded))
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
