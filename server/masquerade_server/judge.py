"""An LLM judge behind an OpenAI-compatible endpoint: scores of 0 to 100 for what personas say.

The endpoint is the operator's own choice. Its key goes into one header and nowhere else: into no report, log or error.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

import httpx

from masquerade_masks import MasqueradeError, SettingError

URL_ENV, MODEL_ENV, KEY_ENV = "MASQUERADE_JUDGE_URL", "MASQUERADE_JUDGE_MODEL", "MASQUERADE_JUDGE_API_KEY"

_TIMEOUT_S = 120.0
_MAX_TOKENS = 64  # a number, and room for a model that says a few words around it
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MAX_WAIT_S = 30.0

IN_CHARACTER = """You judge role play. The character is described between the lines.

[Character start]
{persona}
[Character end]
{scene}
[Message start]
{question}
[Message end]

[Reply start]
{answer}
[Reply end]

How well does the reply stay in this character: its voice, its knowledge, its views and its manners? 0 is not at all, \
as if somebody else spoke; 100 is perfectly. Judge the character only, not grammar or helpfulness. \
Answer with one number from 0 to 100 and nothing else."""

COHERENCE = """You judge text. Somebody was sent a message and replied.
{scene}
[Message start]
{question}
[Message end]

[Reply start]
{answer}
[Reply end]

How coherent is the reply: is it understandable language, free of loops and broken sentences, and an answer to the \
message? 0 is gibberish; 100 is entirely coherent. Do not judge whether it is true or kind. \
Answer with one number from 0 to 100 and nothing else."""


class JudgeError(MasqueradeError):
    """The judge cannot be used at all: it refused the key, the model or the request, or never answered."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Where the judge is. Raises `SettingError`."""

    url: str  # up to and including /v1
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    max_retries: int = 4
    retry_base_s: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError("judge-url", "must be an http(s) URL such as http://127.0.0.1:11434/v1")
        if parts.username or parts.password:
            raise SettingError("judge-url", f"must hold no user name or password; give a key in {KEY_ENV}")
        if not self.model.strip():
            raise SettingError("judge-model", "must not be empty")

    @classmethod
    def resolve(
        cls,
        url: str | None,
        model: str | None,
        *,
        environ: Mapping[str, str] | None = None,
        concurrency: int = 8,
    ) -> JudgeSettings:
        """From flags, else from the environment; the key from there alone, for flags can be seen by others."""
        environ = os.environ if environ is None else environ
        found_url, found_model = url or environ.get(URL_ENV), model or environ.get(MODEL_ENV)
        if not found_url:
            raise SettingError("judge-url", f"is needed with --judge: give it or set {URL_ENV}")
        if not found_model:
            raise SettingError("judge-model", f"is needed with --judge: give it or set {MODEL_ENV}")
        return cls(found_url, found_model, environ.get(KEY_ENV) or None, concurrency)

    @property
    def endpoint(self) -> str:
        """The chat completions call, whichever of its forms the URL was given in."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", "", ""))


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What came of a list of questions to the judge, in their order."""

    scores: tuple[float | None, ...]  # None: unparsable or failed
    num_unparsable: int
    num_failed: int


def parse_score(text: str) -> float | None:
    """The one score from 0 to 100 in a judge's reply; None where there is none, or no telling which.

    Thinking aloud in <think> is passed over, `85/100` and `85 out of 100` are 85, and of several numbers only one that
    is announced (`Score: 85`) counts.
    """
    said = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    said = re.sub(r"(/|\bout of\b)\s*100\b", " ", said.replace("*", " "))
    announced = re.findall(r"\b(?:score|rating)\b\W*(?:is|of|=|:)?\W*?(-?\d+(?:\.\d+)?)", said, flags=re.IGNORECASE)
    numbers = set(announced) or set(re.findall(r"-?\d+(?:\.\d+)?", said))
    if len(numbers) != 1:
        return None
    score = float(numbers.pop())
    return score if 0 <= score <= 100 else None


def fill(prompt: str, **fields: str) -> str:
    """A judge's prompt with its fields put in; other braces, and braces in what is put in, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), prompt)


def ask(
    settings: JudgeSettings, prompts: Sequence[str], *, on_done: Callable[[int, int], None] = lambda done, total: None
) -> Verdicts:
    """Have every prompt judged, several at once.

    A call that fails in a way that may pass is tried again, and counted as failed in the end. Raises `JudgeError` where
    the judge refuses the calls themselves (key, model, path), or answers none.
    """
    return asyncio.run(_ask(settings, prompts, on_done))


async def _ask(settings: JudgeSettings, prompts: Sequence[str], on_done: Callable[[int, int], None]) -> Verdicts:
    headers = {} if settings.api_key is None else {"Authorization": f"Bearer {settings.api_key}"}
    places = asyncio.Semaphore(settings.concurrency)
    done = 0

    async def one(prompt: str) -> str | None:
        nonlocal done
        async with places:
            reply = await _reply(client, settings, prompt)
        done += 1
        on_done(done, len(prompts))
        return reply

    async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT_S) as client:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None  # the first refusal has stopped all other calls
    replies = [task.result() for task in tasks]
    if prompts and all(reply is None for reply in replies):
        raise JudgeError(f"the judge at {settings.endpoint} answered none of {len(prompts)} calls")
    scores = tuple(None if reply is None else parse_score(reply) for reply in replies)
    failed = replies.count(None)
    return Verdicts(scores, num_unparsable=scores.count(None) - failed, num_failed=failed)


async def _reply(client: httpx.AsyncClient, settings: JudgeSettings, prompt: str) -> str | None:
    """The judge's words, None where it could not be had after all tries."""
    body = {
        "model": settings.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
    }
    for attempt in range(settings.max_retries + 1):
        try:
            response = await client.post(settings.endpoint, json=body)
        except httpx.TransportError:
            response = None
        if response is not None and response.is_success:
            return _content(response)
        if response is not None and response.status_code not in _AGAIN:
            raise JudgeError(_refusal(response, settings))
        if attempt < settings.max_retries:
            await asyncio.sleep(_wait_s(response, settings.retry_base_s * 2**attempt))
    return None


def _content(response: httpx.Response) -> str:
    """The reply's text, empty where the body is no chat completion: it then counts as unparsable."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def _refusal(response: httpx.Response, settings: JudgeSettings) -> str:
    said = response.text.strip()
    if settings.api_key is not None:  # servers like to repeat a key that they refuse
        said = said.replace(settings.api_key, "***")
    return f"the judge at {settings.endpoint} answered {response.status_code}: {said[:300]}"


def _wait_s(response: httpx.Response | None, backoff_s: float) -> float:
    """Retry-After where the server gives seconds, else a backoff with jitter."""
    given = "" if response is None else response.headers.get("retry-after", "")
    wait_s = float(given) if re.fullmatch(r"\d+(\.\d+)?", given) else backoff_s * random.uniform(0.75, 1.25)
    return min(wait_s, _MAX_WAIT_S)
