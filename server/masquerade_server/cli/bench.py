"""`masquerade bench`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from masquerade_client import AsyncMasquerade, Masquerade, Sampling
from masquerade_masks import SettingError, utc_now
from masquerade_server.bench import Call, Figures, Outcome, Popularity, Slo, choose, departures, figures_of, question
from masquerade_server.bench.load import run_load
from masquerade_server.cli import options
from masquerade_server.cli.progress import SculptDisplay

_WARM_UP_TOKENS = 4
_DEFAULT_CONCURRENCY = 16

NumPrompts = Annotated[int, typer.Option(help="Requests to send.", min=1)]
Concurrency = Annotated[
    int | None,
    typer.Option(help="Requests in flight at most (16; with --request-rate no limit).", min=1, show_default=False),
]
Rate = Annotated[
    float | None,
    typer.Option("--request-rate", help="Requests a second, departing as a Poisson process (all at once).", min=1e-6),
]
Personas = Annotated[
    str | None, typer.Option(help="Ids, separated by commas; id@2 for a version (all of the server's).")
]
Spread = Annotated[Popularity, typer.Option(help="How requests spread over the personas.")]
ZipfS = Annotated[float, typer.Option("--zipf-s", help="The exponent of --popularity zipf.", min=0)]
InputLen = Annotated[int, typer.Option(help="Tokens of each question; prompt and template come on top.", min=1)]
OutputLen = Annotated[int, typer.Option(help="Tokens of each answer, exactly.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Of questions, popularity and departures.", min=0)]
Goodput = Annotated[
    str | None, typer.Option(help='Count requests within limits, in milliseconds: "ttft:500 tpot:50 e2el:5000".')
]
WarmUp = Annotated[
    bool, typer.Option("--warmup", help="Speak to each persona once before, as in a game's steady state.")
]
Dense = Annotated[bool, typer.Option("--dense", help="The personas' prompts on the unpruned base: id@dense.")]
Base = Annotated[bool, typer.Option("--base", help="The base under its own name, without any persona.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here too, under vLLM's names.")]


def bench(
    url: options.Url = None,
    api_key: options.ApiKey = None,
    num_prompts: NumPrompts = 64,
    concurrency: Concurrency = None,
    request_rate: Rate = None,
    personas: Personas = None,
    popularity: Spread = Popularity.DISTINCT,
    zipf_s: ZipfS = 1.0,
    input_len: InputLen = 30,
    output_len: OutputLen = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    goodput: Goodput = None,
    warmup: WarmUp = False,
    dense: Dense = False,
    base: Base = False,
    json_file: Json = None,
) -> None:
    """Measure a running server under load: throughput, TTFT, TPOT, ITL, E2EL, goodput.

    \b
    masquerade bench --warmup           16 chats at once over all personas
    masquerade bench --warmup --dense   the same on the unpruned base
    masquerade bench --request-rate 2 --popularity zipf --goodput "ttft:500"

    TTFT is from sending a request to its first token, TPOT the mean time per token after it, ITL the time between two
    pieces of text, E2EL the whole reply. Exit status 1 where no request succeeded.
    """
    slo = None if goodput is None else Slo.parse(goodput)
    if concurrency is None and request_rate is None:
        concurrency = _DEFAULT_CONCURRENCY
    with Masquerade(url, api_key=api_key) as client:
        models = _models(client, personas, dense=dense, base=base)
        server = client.server.ready()
    chosen = choose(models, popularity, num_prompts, zipf_s=zipf_s, seed=seed)
    departing = departures(num_prompts, request_rate, seed=seed)
    calls = [
        Call(model, question(input_len, f"{seed}/{number}"), departs_s)
        for number, (model, departs_s) in enumerate(zip(chosen, departing, strict=True))
    ]
    sampling = Sampling(max_tokens=output_len, min_tokens=output_len, ignore_eos=True, temperature=temperature)
    if top_p < 1:
        sampling["top_p"] = top_p

    async def measure() -> Outcome:
        async with AsyncMasquerade(url, api_key=api_key, max_retries=0) as client:
            if warmup:
                await _warm_up(client, sorted(set(chosen)), input_len, seed)
            with Ends("bench", len(calls)) as ends:
                return await run_load(client, calls, sampling, concurrency=concurrency, on_end=ends)

    outcome = asyncio.run(measure())
    figures = figures_of(outcome.results, outcome.duration_s, slo)
    load = {
        "model": server.model,
        "dtype": server.dtype,
        "num_prompts": num_prompts,
        "max_concurrency": concurrency,
        "request_rate": request_rate or "inf",
        "popularity": popularity.value,
        "zipf_s": zipf_s if popularity is Popularity.ZIPF else None,
        "personas": len(models),
        "input_len": input_len,
        "output_len": output_len,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "warmup": warmup,
        "goodput": None if slo is None else dict(slo.limits_ms),
    }
    _show(figures, load)
    if json_file is not None:
        json_file.write_text(json.dumps({"date": utc_now()} | load | figures.as_json(), indent=1) + "\n", "utf-8")
    if not figures.num_completed:
        raise typer.Exit(1)


class Ends:
    """Counts requests that have ended and shows them; a context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._display = SculptDisplay(title)
        self._total = total
        self._ended = 0
        self._started = time.monotonic()

    def __enter__(self) -> Callable[[], None]:
        self._display.__enter__()
        return self._count

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)

    def _count(self) -> None:
        self._ended += 1
        left_s = (time.monotonic() - self._started) / self._ended * (self._total - self._ended)
        self._display.show("requests", self._ended, self._total, eta_s=left_s)


def _models(client: Masquerade, ids: str | None, *, dense: bool, base: bool) -> list[str]:
    """What requests name as their model. Raises `SettingError`, and NotFound for an unknown id."""
    if base:
        if dense or ids is not None:
            raise SettingError("base", "is the base without a persona: give no --personas and no --dense with it")
        return [client.server.ready().model or ""]
    if ids is None:
        models = [persona.id for persona in client.personas.list()]
        if not models:
            raise SettingError("personas", "the server has none yet; create one, or use --base")
    else:
        models = list(dict.fromkeys(one.strip() for one in ids.split(",") if one.strip()))
        if not models:
            raise SettingError("personas", "names none")
        for model in models:
            client.models.get(model)
    if not dense:
        return models
    if versions := [model for model in models if "@" in model]:
        raise SettingError("dense", f"does not go with a version: {versions[0]!r}")
    return [f"{model}@dense" for model in models]


async def _warm_up(client: AsyncMasquerade, models: Sequence[str], input_len: int, seed: int) -> None:
    calls = [Call(model, question(input_len, f"{seed}/warm-up/{model}")) for model in models]
    sampling = Sampling(max_tokens=_WARM_UP_TOKENS, min_tokens=_WARM_UP_TOKENS, ignore_eos=True)
    with Ends("warm-up", len(calls)) as ends:
        await run_load(client, calls, sampling, concurrency=_DEFAULT_CONCURRENCY, on_end=ends)


# --- the table


def _show(figures: Figures, load: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{load['model']} ({load['dtype']}), {load['popularity']} over {load['personas']}: "
        f"questions of {load['input_len']} tokens, answers of {load['output_len']}",
        markup=False,
    )
    totals = Table.grid(padding=(0, 2))
    totals.add_column()
    totals.add_column(justify="right")
    for label, value in _totals(figures):
        totals.add_row(label, value)
    console.print(totals)
    if figures.num_completed:
        console.print(_latencies(figures))
    for kind, count in sorted(figures.failures.items()):
        console.print(f"{count} x {kind}, such as: {figures.examples[kind]}", markup=False)


def _totals(figures: Figures) -> list[tuple[str, str]]:
    rows = [
        ("Successful requests", f"{figures.num_completed}"),
        ("Failed requests", f"{sum(figures.failures.values())}"),
        ("Benchmark duration (s)", f"{figures.duration_s:.2f}"),
        ("Total prompt tokens", f"{figures.num_prompt_tokens}"),
        ("Cached prompt tokens (%)", f"{100 * figures.cached_share:.1f}"),
        ("Total output tokens", f"{figures.num_output_tokens}"),
        ("Request throughput (req/s)", f"{figures.request_throughput:.2f}"),
    ]
    if figures.request_goodput is not None:
        rows.append(("Request goodput (req/s)", f"{figures.request_goodput:.2f}"))
    return [
        *rows,
        ("Output token throughput (tok/s)", f"{figures.output_throughput:.1f}"),
        ("Total token throughput (tok/s)", f"{figures.total_token_throughput:.1f}"),
    ]


def _latencies(figures: Figures) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("ms", "mean", "p50", "p90", "p99"):
        table.add_column(name, justify="left" if name == "ms" else "right")
    for name, one in figures.latencies.items():
        table.add_row(name.upper(), *(f"{value:.1f}" for value in (one.mean, one.p50, one.p90, one.p99)))
    return table
