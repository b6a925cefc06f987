"""The remote teacher's HTTP, against a real server that misbehaves."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_teacher import Script, ScriptedTeacher, fails, says, scripted_teachers
from starlette.responses import JSONResponse, Response

from masquerade_masks import SculptCancelled, SettingError, TeacherError
from masquerade_pruner import Chat, Reply
from masquerade_server.jobs import WorkerConfig
from masquerade_server.remote_teacher import CACHE_FILE, TRIES, RemoteTeacher, _asked_s, backoff_s
from masquerade_server.settings import Settings, TeacherSettings
from masquerade_server.teachers import open_teacher

KEY = "sk-never-to-be-seen-0451"
Body = dict[str, Any]


@pytest.fixture
def teach() -> Iterator[Callable[..., ScriptedTeacher]]:
    with scripted_teachers() as start:
        yield start


def settings_of(teacher: ScriptedTeacher, **changes: Any) -> TeacherSettings:
    return TeacherSettings(**({"url": teacher.url, "model": "scribe", "api_key": KEY} | changes))


def chats(count: int) -> list[Chat]:
    return [Chat(f"q{number}", f"Question {number}?", 32, 0.7, seed=number) for number in range(count)]


def ask(
    settings: TeacherSettings,
    data_dir: Path,
    wanted: list[Chat],
    *,
    usable: Callable[[Reply], bool] = lambda reply: True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Reply]:
    with RemoteTeacher(settings, data_dir, first_wait_s=0.01) as teacher:
        replies = list(teacher.replies(wanted, usable=usable, between=between))
    assert len({one.chat_id for one in replies}) == len(replies)
    return {one.chat_id: one for one in replies}


def first_then(*first: Response) -> Script:
    """These responses, and then agreement."""

    async def script(number: int, body: Body) -> Response:
        return first[number] if number < len(first) else says("Aye.")

    return script


# --- what is asked and read


def test_a_chat_is_asked_as_openai_would_have_it(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    teacher = teach(first_then(says("Nay.", "length")))
    found = ask(settings_of(teacher), tmp_path, chats(1))
    assert found == {"q0": Reply("q0", "Nay.", "length")}
    assert teacher.bodies == [
        {
            "model": "scribe",
            "messages": [{"role": "user", "content": "Question 0?"}],
            "max_tokens": 32,
            "temperature": 0.7,
            "seed": 0,
        }
    ]
    assert teacher.keys == [f"Bearer {KEY}"]


def test_no_key_is_no_header(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    teacher = teach()
    ask(settings_of(teacher, api_key=None), tmp_path, chats(1))
    assert teacher.keys == [None]


@pytest.mark.parametrize(
    ("response", "finish"),
    [
        (says("Aye.", "stop"), "stop"),
        (says("Aye.", "length"), "length"),
        (says("Aye.", "anything"), "length"),  # unknown: its end is not learned
        (says("", "content_filter"), "refused"),
        (fails(400, "The response was filtered: content_filter"), "refused"),
    ],
)
def test_how_a_reply_ended(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path, response: Response, finish: str
) -> None:
    assert ask(settings_of(teach(first_then(response))), tmp_path, chats(1))["q0"].finish == finish


def test_a_reply_without_text_is_empty(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    assert ask(settings_of(teach(first_then(says(None)))), tmp_path, chats(1))["q0"].text == ""


def test_so_many_are_asked_at_once_and_no_more(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    async def slow(number: int, body: Body) -> Response:
        await asyncio.sleep(0.02)
        return says("Aye.")

    teacher = teach(slow)
    assert len(ask(settings_of(teacher, concurrency=3), tmp_path, chats(12))) == 12
    assert teacher.most_at_once == 3


def test_fields_that_a_teacher_declines_are_left_out_or_renamed(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path
) -> None:
    async def strict(number: int, body: Body) -> Response:
        if "max_tokens" in body:
            return fails(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return fails(422, "extra_forbidden: body.seed") if "seed" in body else says("Aye.")

    teacher = teach(strict)
    assert len(ask(settings_of(teacher, concurrency=4), tmp_path, chats(6))) == 6
    assert teacher.bodies[-1].keys() == {"model", "messages", "max_completion_tokens", "temperature"}
    assert len(teacher.bodies) <= 6 + 2 * 4  # found out once, by those that were under way


# --- what is tried again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_trouble_that_passes_is_waited_out(teach: Callable[..., ScriptedTeacher], tmp_path: Path, status: int) -> None:
    teacher = teach(first_then(fails(status), fails(status)))
    assert ask(settings_of(teacher), tmp_path, chats(1))["q0"].text == "Aye."
    assert len(teacher.bodies) == 3


@pytest.mark.parametrize("nonsense", [Response("<html>"), JSONResponse({}), JSONResponse({"choices": []})])
def test_an_answer_that_is_no_completion_is_asked_for_again(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path, nonsense: Response
) -> None:
    assert ask(settings_of(teach(first_then(nonsense))), tmp_path, chats(1))["q0"].text == "Aye."


def test_retry_after_holds_everybody_back(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    loop_times: list[float] = []

    async def limited(number: int, body: Body) -> Response:
        loop_times.append(asyncio.get_running_loop().time())
        return fails(429, retry_after="1") if number == 0 else says("Aye.")

    teacher = teach(limited)
    assert len(ask(settings_of(teacher, concurrency=1), tmp_path, chats(3))) == 3
    assert len(teacher.bodies) == 4
    assert loop_times[1] - loop_times[0] >= 1.0  # what was asked for, not the hundredth of a second of the first wait


def test_retry_after_is_seconds_or_a_date() -> None:
    def said(value: str) -> float | None:
        return _asked_s(httpx.Response(429, headers={"retry-after": value}))

    assert said("2.5") == 2.5
    assert said("-1") == 0.0
    assert said("soon") is None
    in_a_minute = said(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    assert _asked_s(httpx.Response(429)) is None


def test_waits_double_up_to_a_minute() -> None:
    assert [backoff_s(tries, 1.0) for tries in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_teacher_that_hangs_is_asked_again(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    async def hangs_once(number: int, body: Body) -> Response:
        return await teacher.hang() if number == 0 else says("Aye.")

    teacher = teach(hangs_once)
    assert ask(settings_of(teacher, timeout_s=0.3), tmp_path, chats(1))["q0"].text == "Aye."
    assert len(teacher.bodies) == 2


def test_a_rate_limit_that_lets_others_through_is_no_outage(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path
) -> None:
    async def unlucky(number: int, body: Body) -> Response:
        unlucky_one = body["messages"][0]["content"] == "Question 0?"
        if unlucky_one and len(teacher.bodies) < 6 * TRIES:
            return fails(429)
        await asyncio.sleep(0.01)
        return says("Aye.")

    teacher = teach(unlucky)
    assert len(ask(settings_of(teacher, concurrency=2), tmp_path, chats(6 * TRIES))) == 6 * TRIES


# --- what is given up


def test_a_teacher_that_stays_down_is_named_with_its_status(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path
) -> None:
    async def down(number: int, body: Body) -> Response:
        return fails(503, f"overloaded, {KEY}")

    teacher = teach(down)
    host = httpx.URL(teacher.url).netloc.decode()
    with pytest.raises(TeacherError, match=rf"the teacher at {host} answered 503, {TRIES} times in a row"):
        ask(settings_of(teacher), tmp_path, chats(1))
    assert len(teacher.bodies) == TRIES


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        settings = TeacherSettings(f"http://{host}/v1", "scribe")
        with pytest.raises(TeacherError, match=rf"{host} cannot be reached \(ConnectError\)"):
            ask(settings, tmp_path, chats(1))


@pytest.mark.parametrize(
    ("response", "says_"),
    [
        (fails(401), "answered 401: it does not take the key"),
        (fails(404), "answered 404: .*teacher_url"),
        (fails(400, "bad"), "answered 400"),
        (fails(307, location="http://127.0.0.1:9/v1"), "answered 307"),  # the key goes nowhere else
        (fails(429, retry_after="86400"), "asks to wait 86400 s"),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path, response: Response, says_: str
) -> None:
    teacher = teach(first_then(response))
    with pytest.raises(TeacherError, match=says_):
        ask(settings_of(teacher), tmp_path, chats(1))
    assert len(teacher.bodies) == 1


def test_what_was_paid_for_beside_a_failure_is_kept(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    teacher = teach(first_then(says("One."), says("Two."), fails(401)))
    with pytest.raises(TeacherError):
        ask(settings_of(teacher, concurrency=1), tmp_path, chats(5))
    found = ask(settings_of(teacher, concurrency=1), tmp_path, chats(5))
    assert [found[f"q{number}"].text for number in range(5)] == ["One.", "Two.", "Aye.", "Aye.", "Aye."]
    assert len(teacher.bodies) == 6


# --- what is remembered


def test_a_second_run_asks_nothing(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    async def counts(number: int, body: Body) -> Response:
        return says(f"Aye, {number}.", "length" if number % 2 else "stop")

    teacher = teach(counts)
    first = ask(settings_of(teacher), tmp_path, chats(9))
    assert ask(settings_of(teacher), tmp_path, chats(9)) == first
    assert len(teacher.bodies) == 9
    ask(settings_of(teacher), tmp_path, chats(10))
    assert len(teacher.bodies) == 10


@pytest.mark.parametrize(
    "changed",
    [
        Chat("q0", "Another?", 32, 0.7, 0),
        Chat("q0", "Question 0?", 33, 0.7, 0),
        Chat("q0", "Question 0?", 32, 0.8, 0),
        Chat("q0", "Question 0?", 32, 0.7, 1),
    ],
)
def test_another_request_is_asked(teach: Callable[..., ScriptedTeacher], tmp_path: Path, changed: Chat) -> None:
    teacher = teach()
    ask(settings_of(teacher), tmp_path, chats(1))
    ask(settings_of(teacher), tmp_path, [changed])
    assert len(teacher.bodies) == 2


def test_another_teacher_is_asked_and_another_key_is_not(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    teacher, other = teach(), teach()
    for settings in (settings_of(teacher), settings_of(teacher, model="other"), settings_of(other)):
        ask(settings, tmp_path, chats(1))
    assert (len(teacher.bodies), len(other.bodies)) == (2, 1)
    ask(settings_of(teacher, api_key="renewed"), tmp_path, chats(1))
    assert len(teacher.bodies) == 2


def test_what_is_unusable_is_asked_again(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    teacher = teach(first_then(says(""), says("")))

    def usable(reply: Reply) -> bool:
        return bool(reply.text)

    ask(settings_of(teacher, concurrency=1), tmp_path, chats(3), usable=usable)
    found = ask(settings_of(teacher, concurrency=1), tmp_path, chats(3), usable=usable)
    assert len(teacher.bodies) == 5
    assert {one.text for one in found.values()} == {"Aye."}


def test_a_cache_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_bytes(b"no database at all" * 100)
    with pytest.raises(SettingError, match="cache of answers"):
        RemoteTeacher(TeacherSettings("http://127.0.0.1:9/v1", "scribe"), tmp_path)


# --- leaving


def test_a_cancellation_does_not_wait_for_the_teacher(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    async def stuck(number: int, body: Body) -> Response:
        return says("Aye.") if number < 2 else await teacher.hang()

    teacher = teach(stuck)
    answered: list[Reply] = []

    def between() -> None:
        if len(teacher.bodies) >= 4:
            raise SculptCancelled

    def usable(reply: Reply) -> bool:
        answered.append(reply)
        return True

    with pytest.raises(SculptCancelled):  # `stuck` hangs to the end of this test: waiting for it would never return
        ask(settings_of(teacher, concurrency=2), tmp_path, chats(8), usable=usable, between=between)
    assert len(answered) == 2
    known = ask(settings_of(teacher), tmp_path, [chats(8)[int(one.chat_id[1:])] for one in answered])
    assert len(known) == 2


def test_leaving_early_gives_up_on_the_rest(teach: Callable[..., ScriptedTeacher], tmp_path: Path) -> None:
    async def stuck(number: int, body: Body) -> Response:
        return says("Aye.") if number < 1 else await teacher.hang()

    teacher = teach(stuck)
    with RemoteTeacher(settings_of(teacher), tmp_path) as remote:
        replies = remote.replies(chats(4), usable=lambda reply: True, between=lambda: None)
        assert next(replies).text == "Aye."
        replies.close()


# --- the key


def test_the_key_is_nowhere(
    teach: Callable[..., ScriptedTeacher], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    teacher = teach(first_then(says("Aye."), fails(500, f"the key {KEY} is tired"), fails(401, f"bad key {KEY}")))
    settings = settings_of(teacher, concurrency=1)
    server = Settings(teacher_url=teacher.url, teacher_model="scribe", teacher_api_key=KEY)
    config = WorkerConfig.of(server)
    with pytest.raises(TeacherError) as failure:
        ask(settings, tmp_path, chats(3))
    seen = [str(failure.value), repr(failure.value), caplog.text, repr(settings), repr(server), repr(config)]
    assert "***" in caplog.text  # the teacher's own words were logged, without the key in them
    assert not any(KEY in one for one in seen)
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert WorkerConfig.from_line(config.to_line().decode()).teacher == server.teacher  # the worker does get it


def test_only_a_wanted_and_configured_teacher_is_opened(tmp_path: Path) -> None:
    settings = TeacherSettings("http://127.0.0.1:9/v1", "scribe")
    for wanted, configured in (("base", settings), ("base", None), ("remote", None)):
        with open_teacher(wanted, configured, tmp_path / "none") as teacher:
            assert teacher is None
    assert not (tmp_path / "none").exists()
    with open_teacher("remote", settings, tmp_path) as teacher:
        assert teacher is not None
        assert teacher.name == "scribe"
