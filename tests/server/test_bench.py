"""`masquerade bench`: the figures by their definitions on hand-made timelines, and a load on a real server."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, ScriptedEngine, Starter, token
from typer.testing import CliRunner

from masquerade_client import AsyncMasquerade, Sampling
from masquerade_engine.requests import Request, TokenOutput
from masquerade_masks import QueueFull, SettingError
from masquerade_server import cli
from masquerade_server.bench import (
    Call,
    Distribution,
    Failure,
    Outcome,
    Popularity,
    Slo,
    Timeline,
    choose,
    departures,
    figures_of,
    question,
    run_load,
)
from masquerade_server.bench.workload import WORDS
from masquerade_server.settings import Settings


def timeline(sent: float, first: float, last: float, *, texts: tuple[float, ...] = (), tokens: int = 5) -> Timeline:
    return Timeline(sent, first, last, texts, num_prompt_tokens=100, num_cached_tokens=80, num_output_tokens=tokens)


# --- definitions


def test_latencies_of_one_reply() -> None:
    reply = timeline(10.0, 10.5, 12.5, texts=(10.5, 11.0, 11.4, 12.5), tokens=5)
    assert reply.ttft_s == 0.5
    assert reply.e2el_s == 2.5
    assert reply.tpot_s == 0.5  # 2 s over the four tokens after the first
    assert reply.itls_s == pytest.approx([0.5, 0.4, 1.1])


def test_a_reply_of_one_token_has_no_tpot() -> None:
    assert timeline(0.0, 1.0, 1.0, tokens=1).tpot_s is None
    figures = figures_of([timeline(0, 1, 1, tokens=1), timeline(0, 1, 3, tokens=3)], 4.0)
    assert figures.tpot.mean == 1000.0  # the mean is over replies that have one


def test_percentiles_are_interpolated() -> None:
    found = Distribution.of([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (found.mean, found.p50) == pytest.approx((300.0, 300.0))
    assert (found.p90, found.p99) == pytest.approx((460.0, 496.0))


def test_throughputs_count_whole_replies_over_the_run() -> None:
    replies = [timeline(0, 1, 2, tokens=10), timeline(1, 2, 4, tokens=30)]
    figures = figures_of([*replies, Failure("RateLimited 429", "full")], 8.0)
    assert figures.request_throughput == 2 / 8
    assert figures.output_throughput == 40 / 8
    assert figures.total_token_throughput == (200 + 40) / 8
    assert figures.cached_share == 0.8
    assert figures.failures == {"RateLimited 429": 1}
    assert figures.request_goodput is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ("ttft:1000", 2),
        ("ttft:999", 1),  # at the limit is within it
        ("tpot:500", 2),
        ("tpot:499", 1),
        ("e2el:2999,ttft:1000", 1),
        ("ttft:500 tpot:250 e2el:1000", 1),  # one reply must keep all of them
        ("ttft:499 tpot:250", 0),
    ],
)
def test_goodput_counts_replies_within_every_limit(slo: str, good: int) -> None:
    fast = timeline(0.0, 0.5, 1.0, tokens=3)  # TTFT 500 ms, TPOT 250 ms, E2EL 1 s
    slow = timeline(5.0, 6.0, 8.0, tokens=5)  # 1 s, 500 ms, 3 s
    figures = figures_of([fast, slow], 4.0, Slo.parse(slo))
    assert figures.num_good == good
    assert figures.request_goodput == good / 4


@pytest.mark.parametrize("text", ["ttf:5", "ttft", "ttft:", "ttft:fast", "tpot:0", "itl:5", "tpot:-1"])
def test_a_wrong_slo_names_the_field(text: str) -> None:
    with pytest.raises(SettingError) as found:
        Slo.parse(text)
    assert found.value.field == "goodput"


def test_figures_of_nothing_are_null_in_json() -> None:
    payload = figures_of([Failure("APITimeout", "late")], 3.0).as_json()
    assert payload["completed"] == 0
    assert payload["p99_ttft_ms"] is None
    assert math.isnan(figures_of([], 1.0).cached_share)
    json.dumps(payload, allow_nan=False)


# --- the load


def test_popularity() -> None:
    models = [f"p{number}" for number in range(10)]
    distinct = choose(models, Popularity.DISTINCT, 25, seed=1)
    assert all(len(set(distinct[start : start + 10])) == 10 for start in range(0, 16))
    assert len(set(choose(models, Popularity.IDENTICAL, 25, seed=1))) == 1
    uniform = Counter(choose(models, Popularity.UNIFORM, 10_000, seed=1))
    assert all(850 < count < 1150 for count in uniform.values())  # 1000 each, sigma 30
    zipf = [count for _, count in Counter(choose(models, Popularity.ZIPF, 10_000, zipf_s=1.0, seed=1)).most_common()]
    harmonic = sum(1 / rank for rank in range(1, 11))
    assert zipf[0] == pytest.approx(10_000 / harmonic, rel=0.1)
    assert zipf[1] == pytest.approx(10_000 / harmonic / 2, rel=0.1)
    flat = Counter(choose(models, Popularity.ZIPF, 10_000, zipf_s=0.0, seed=1))
    assert all(850 < count < 1150 for count in flat.values())
    assert choose(models, Popularity.ZIPF, 50, seed=1) == choose(models, Popularity.ZIPF, 50, seed=1)
    assert choose(models, Popularity.ZIPF, 50, seed=1) != choose(models, Popularity.ZIPF, 50, seed=2)


def test_departures_are_poisson() -> None:
    assert departures(3, None) == [0.0, 0.0, 0.0]
    moments = departures(4000, 8.0, seed=3)
    gaps = [after - before for before, after in zip([0.0, *moments], moments, strict=False)]
    assert all(gap >= 0 for gap in gaps)
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.1)  # an exponential's


def test_questions_differ_and_have_their_length() -> None:
    assert question(30, "a/1") == question(30, "a/1")
    assert question(30, "a/1") != question(30, "a/2")
    assert len(question(30, "a/1").split()) == 30


@pytest.mark.real_model
def test_a_word_of_a_question_is_one_token(bundled_base: Any) -> None:
    def count(text: str) -> int:
        return len(bundled_base.tokenizer(text, add_special_tokens=False)["input_ids"])

    assert [word for word in WORDS if count(word) != 1 or count(f" {word}") != 1] == []
    assert count(question(30, 0)) == 30


# --- against a server


def measure(url: str, calls: list[Call], *, concurrency: int | None = None) -> Outcome:
    async def run() -> Outcome:
        async with AsyncMasquerade(url, max_retries=0) as client:
            sampling = Sampling(max_tokens=4, min_tokens=4, ignore_eos=True, temperature=0.0)
            return await run_load(client, calls, sampling, concurrency=concurrency)

    return asyncio.run(run())


def test_a_load_on_the_real_engine(town: RunningServer) -> None:
    calls = [Call(model, question(5, number)) for number, model in enumerate(["mira", "plain", "mira@dense"] * 3)]
    outcome = measure(town.url, [*calls, Call("nobody", "hi")], concurrency=4)
    figures = figures_of(outcome.results, outcome.duration_s)
    assert figures.num_completed == 9
    assert figures.num_output_tokens == 9 * 4
    assert figures.failures == {"NotFound 404 (model_not_found)": 1}
    for reply in outcome.results[:9]:
        assert isinstance(reply, Timeline)
        assert reply.sent <= reply.first <= reply.last
        assert reply.e2el_s <= outcome.duration_s
        assert all(reply.first <= moment <= reply.last for moment in reply.texts)


def test_concurrency_is_kept_and_failures_are_counted(start_server: Starter, settings: Settings) -> None:
    running, most = 0, 0

    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        nonlocal running, most
        if len(engine.requests) > 6:
            raise QueueFull(8, 2.0)
        running += 1
        most = max(most, running)
        for number in range(1, 5):
            await asyncio.sleep(0.02)
            finish = "length" if number == 4 else None
            yield token(request, "" if number == 2 else "a", finish=finish, number=number)
        running -= 1

    engine = ScriptedEngine(script)
    server = start_server(settings, engine.factory)
    calls = [Call(server.base.name, "hi") for _ in range(8)]
    outcome = measure(server.url, calls, concurrency=3)
    figures = figures_of(outcome.results, outcome.duration_s)
    assert most == 3
    assert (figures.num_completed, sum(figures.failures.values())) == (6, 2)
    assert next(iter(figures.failures)).startswith("RateLimited 429")
    replies = [one for one in outcome.results if isinstance(one, Timeline)]
    assert all(len(reply.texts) == 3 and reply.num_output_tokens == 4 for reply in replies)
    assert all(reply.sent < reply.first < reply.texts[1] < reply.last for reply in replies)


def test_a_stream_that_breaks_off_is_a_failure(start_server: Starter, settings: Settings) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenOutput, None]:
        yield token(request, "a", number=1)
        yield token(request, "", finish="error", number=1)

    server = start_server(settings, ScriptedEngine(script).factory)
    (result,) = measure(server.url, [Call(server.base.name, "hi")]).results
    assert isinstance(result, Failure)
    assert result.kind.startswith("ServerError 500")


# --- the command


def bench(url: str, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "--url", url, *arguments], env={"COLUMNS": "120"})


def test_the_command_explains_itself() -> None:
    result = CliRunner().invoke(cli.app, ["bench", "--help"])
    assert result.exit_code == 0
    assert "masquerade bench --warmup" in result.output  # an example


def test_the_command_prints_the_fields_table(town: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    size = ["--num-prompts", "6", "--concurrency", "3", "--input-len", "5", "--output-len", "4"]
    result = bench(town.url, *size, "--warmup", "--popularity", "zipf", "--goodput", "e2el:600000", "--json", str(path))
    assert result.exit_code == 0, result.output
    for label in ("Successful requests", "Request goodput", "Output token throughput", "TTFT", "TPOT", "ITL", "E2EL"):
        assert label in result.output
    written = json.loads(path.read_text())
    assert (written["completed"], written["failed"], written["total_output_tokens"]) == (6, 0, 24)
    assert written["request_goodput"] == pytest.approx(written["request_throughput"])
    assert written["cached_prompt_tokens"] > 0  # it was warmed up
    assert written["mean_ttft_ms"] > 0
    assert written["p99_e2el_ms"] >= written["p50_e2el_ms"] >= written["median_ttft_ms"]


def test_dense_and_base_are_asked_for_by_name(town: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    few = ["--num-prompts", "2", "--input-len", "3", "--output-len", "2", "--json", str(path)]
    assert bench(town.url, *few, "--dense", "--personas", "mira").exit_code == 0
    with_prompt = json.loads(path.read_text())["total_input_tokens"]
    assert bench(town.url, *few, "--base").exit_code == 0
    assert json.loads(path.read_text())["total_input_tokens"] < with_prompt


def test_what_cannot_be_measured_is_told(town: RunningServer) -> None:
    for arguments, words in (
        (["--base", "--dense"], "base"),
        (["--dense", "--personas", "mira@1"], "version"),
        (["--goodput", "ttft"], "goodput"),
    ):
        result = bench(town.url, "--num-prompts", "1", *arguments)
        assert isinstance(result.exception, SettingError), result.output
        assert words in str(result.exception)
    assert bench(town.url, "--personas", "nobody").exit_code == 1
