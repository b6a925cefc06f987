"""The judge's client against a real HTTP server, and what becomes of its scores."""

from __future__ import annotations

import time

import pytest
from fake_judge import judge_server

from masquerade_masks import SettingError
from masquerade_pruner.appraisal import Spoken
from masquerade_server.judge import JudgeError, JudgeSettings, ask, fill, parse_score
from masquerade_server.judging import judge

KEY = "sk-very-secret-0123456789"


def settings(url: str, **changes: object) -> JudgeSettings:
    return JudgeSettings(**{"url": url, "model": "m", "api_key": KEY, "retry_base_s": 0.001} | changes)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85),
        (" 85.5\n", 85.5),
        ("Score: 85", 85),
        ("**Score:** 85/100", 85),
        ("I would say 85 out of 100.", 85),
        ("Of its 3 sentences 2 are in character. Score: 70", 70),
        ("The score is 70. I repeat, score: 70", 70),
        ("<think>maybe 20, maybe 30</think>\n40", 40),
        ("0", 0),
        ("100", 100),
        ("101", None),
        ("-5", None),
        ("between 60 and 70", None),
        ("Score: 60, or rather score: 70", None),
        ("REFUSAL", None),
        ("", None),
    ],
)
def test_one_number_is_parsed_and_nothing_is_guessed(text: str, score: float | None) -> None:
    assert parse_score(text) == score


def test_filling_touches_only_its_own_fields() -> None:
    assert (
        fill('{question} {answer} {"a": 1} {other}', question="{answer}?", answer="!") == '{answer}? ! {"a": 1} {other}'
    )


def test_scores_come_in_the_order_of_the_prompts_and_several_at_once() -> None:
    def script(prompt: str, number: int) -> tuple[int, str]:
        time.sleep(0.02)
        return 200, prompt.rsplit(maxsplit=1)[-1]

    done: list[tuple[int, int]] = []
    with judge_server(script) as server:
        verdicts = ask(
            settings(server.url, concurrency=4), [f"say {n}" for n in range(12)], on_done=lambda *n: done.append(n)
        )
    assert verdicts.scores == tuple(map(float, range(12)))
    assert (verdicts.num_unparsable, verdicts.num_failed) == (0, 0)
    assert 1 < server.most_at_once <= 4
    assert done[-1] == (12, 12)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.bodies[0]["model"] == "m"
    assert server.bodies[0]["temperature"] == 0


def test_what_passes_is_tried_again_and_what_stays_is_counted() -> None:
    tries: dict[str, int] = {}

    def script(prompt: str, number: int) -> tuple[int, object]:
        tries[prompt] = tries.get(prompt, 0) + 1
        if prompt == "shy" and tries[prompt] < 3:
            return 429, {"error": {"message": "later"}}
        if prompt == "broken":
            return 503, {"error": {"message": "never"}}
        return 200, {"odd": "body"} if prompt == "odd" else "50 or 60" if prompt == "vague" else "50"

    with judge_server(script) as server:
        verdicts = ask(settings(server.url, max_retries=3), ["shy", "broken", "vague", "odd", "fine"])
    assert verdicts.scores == (50, None, None, None, 50)
    assert (verdicts.num_unparsable, verdicts.num_failed) == (2, 1)
    assert tries["shy"] == 3
    assert tries["broken"] == 4


def test_a_refusal_is_told_without_the_key() -> None:
    def script(prompt: str, number: int) -> tuple[int, object]:
        return 401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}

    with judge_server(script) as server, pytest.raises(JudgeError, match="401") as refused:
        ask(settings(server.url), ["a", "b", "c"])
    assert "Incorrect API key" in str(refused.value)
    assert KEY not in str(refused.value)
    assert KEY not in repr(settings(server.url))
    with judge_server(script) as server, pytest.raises(JudgeError, match="404"):
        ask(settings(server.url.replace("/v1", "/v2")), ["a"])


def test_a_judge_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(JudgeError, match="answered none of 2"):
        ask(settings("http://127.0.0.1:9/v1", max_retries=1), ["a", "b"])


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/chat/completions"])
def test_the_url_may_be_given_in_any_of_its_forms(path: str) -> None:
    assert settings(f"http://judge:1{path}").endpoint == "http://judge:1/v1/chat/completions"


def test_settings_from_flags_and_the_environment() -> None:
    environ = {
        "MASQUERADE_JUDGE_URL": "http://a/v1",
        "MASQUERADE_JUDGE_MODEL": "m",
        "MASQUERADE_JUDGE_API_KEY": KEY,
    }
    found = JudgeSettings.resolve(None, "other", environ=environ)
    assert (found.url, found.model, found.api_key) == ("http://a/v1", "other", KEY)
    for url, model, says in (
        (None, "m", "MASQUERADE_JUDGE_URL"),
        ("http://a", None, "MASQUERADE_JUDGE_MODEL"),
        ("ftp://a", "m", "http"),
        ("http://me:secret@a/v1", "m", "MASQUERADE_JUDGE_API_KEY"),
    ):
        with pytest.raises(SettingError, match=says):
            JudgeSettings.resolve(url, model, environ={})


def spoken(part: str, id: str, model: str, answer: str, history: tuple[str, ...] = ()) -> Spoken:
    return Spoken(part, id, model, "A dark inn.", history, "Who are you?", answer, True)


def test_answers_are_compared_in_pairs_by_part() -> None:
    answers = [
        spoken("one_turn", "1", "dense", "90"),
        spoken("one_turn", "1", "sculpted", "80"),
        spoken("one_turn", "2", "dense", "70"),
        spoken("one_turn", "2", "sculpted", "unclear"),
        spoken("questions/one_turn", "3", "dense", "10", ("Hello?", "Aye.")),
        spoken("questions/one_turn", "3", "sculpted", "30"),
    ]

    def script(prompt: str, number: int) -> tuple[int, str]:
        return 200, prompt.partition("[Reply start]")[2].partition("[Reply end]")[0].strip() or "55"

    with judge_server(script) as server:
        found = judge(settings(server.url), answers, "You are Mira.", eval_prompt="Proud? {question} / {answer}")
    report = found.report
    for criterion in ("in_character", "coherence"):
        assert report[criterion]["num_unparsable"] == 1
        assert report[criterion]["one_turn"]["num_questions"] == 1  # the one that both have a score for
        assert report[criterion]["one_turn"]["difference"]["mean"] == -10
        assert report[criterion]["questions/one_turn"]["difference"]["mean"] == 20
    assert report["eval_prompt"]["num_judged"] == 2
    assert set(report["eval_prompt"]) == {"num_judged", "num_unparsable", "num_failed", "questions/one_turn"}
    assert found.scores["in_character"] == [90, 80, 70, None, 10, 30]
    assert found.scores["eval_prompt"] == [None, None, None, None, 55, 55]
    prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert any("You are Mira." in one and "A dark inn." in one for one in prompts)
    assert any("Message: Hello?\nReply: Aye." in one for one in prompts)
    assert "Proud? Who are you? / 10" in prompts
    assert KEY not in str(report)
