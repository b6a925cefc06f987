"""What clients may send: pydantic models of every JSON body, and the screen for fields of other servers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from masquerade_masks import SettingError

MAX_NAME_CHARS = 100
MAX_TEXT_BYTES = 16_384  # UTF-8; about 4,000 tokens. What the context leaves is checked in tokens besides
MAX_MESSAGES = 4096
MAX_SPARSITY = 0.9
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_CHOICES = 16
MAX_DEADLINE_S = 3600.0
MAX_WARM_IDS = 256
ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
Preset = Literal["smoke", "default", "thorough"]


# --- /personas ----------------------------------------------------------------------------------------------


def _one_line(value: str) -> str:
    stripped = value.strip()
    if not stripped:
        raise ValueError("must not be empty")
    if not stripped.isprintable():
        raise ValueError("must be one line without control characters")
    return stripped


def _prose(value: str) -> str:
    stripped = value.strip()
    if not stripped:
        raise ValueError("must not be empty: describe who the persona is, how it speaks, what it wants")
    if any(char < " " and char not in "\n\r\t" for char in stripped):
        raise ValueError("must not hold control characters")
    if (size := len(stripped.encode())) > MAX_TEXT_BYTES:
        raise ValueError(f"is {size} bytes long; the limit is {MAX_TEXT_BYTES}")
    return stripped


Name = Annotated[str, Field(max_length=MAX_NAME_CHARS), AfterValidator(_one_line)]
PersonaText = Annotated[str, AfterValidator(_prose)]
Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
Sparsity = Annotated[float, Field(strict=True, gt=0, le=MAX_SPARSITY, allow_inf_nan=False)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
Flag = Annotated[bool, Field(strict=True)]
Recovery = Literal["none", "vectors", "lora", "full"]
Teacher = Literal["base", "remote"]  # remote: the one that the operator has configured


class PersonaBody(BaseModel):
    """`POST /personas`."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    text: PersonaText
    id: Identifier | None = None  # made from the name where it is left out
    sparsity: Sparsity = 0.25
    recovery: Recovery = "none"
    teacher: Teacher = "base"
    cast: Identifier = "default"
    preset: Preset = "default"
    seed: Seed = 0
    sculpt: Flag = True  # false: only the persona; a mask is uploaded, or learned by a later PATCH
    dry_run: Flag = False


class PersonaPatch(BaseModel):
    """`PATCH /personas/{id}`: what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    text: PersonaText | None = None
    sparsity: Sparsity | None = None
    recovery: Recovery | None = None
    teacher: Teacher | None = None
    preset: Preset | None = None
    seed: Seed | None = None
    sculpt: Flag | None = None  # None: sculpt if anything changed; true: in any case; false: keep the mask


class RollbackBody(BaseModel):
    """`POST /personas/{id}/rollback`."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(strict=True, ge=1)] | None = None  # None: the one before


class WarmBody(BaseModel):
    """`POST /personas/warm`."""

    model_config = ConfigDict(extra="forbid")

    # What `model` takes: a persona's id, `id@3` or `id@dense`.
    ids: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_WARM_IDS)]
    pin: Flag = False  # kept until another version is served in its place


# --- chat and completions -----------------------------------------------------------------------------------


def _joined_parts(value: Any) -> Any:
    """OpenAI's list of content parts as one string; refuses what is not text."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
            raise ValueError(f"holds a part of type {kind!r}; this server reads text only")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(BaseModel):
    """One turn. `name` and the like are accepted and not used."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]


def _message_without_content(value: Any) -> Any:
    """An assistant's turn may have `content: null`; one with tool calls is refused."""
    if isinstance(value, dict) and value.get("role") == "assistant":
        if value.get("tool_calls") or value.get("function_call"):
            raise ValueError("holds tool calls; this server has no tools")
        if value.get("content") is None:
            return value | {"content": ""}
    return value


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = False


Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _stop_strings(value: Any) -> Any:
    given = [value] if isinstance(value, str) else value
    if given is None:
        return None
    if not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise ValueError("must be a string or a list of strings")
    if len(given) > MAX_STOP_STRINGS:
        raise ValueError(f"must hold at most {MAX_STOP_STRINGS} strings")
    if not all(0 < len(one) <= MAX_STOP_CHARS for one in given):
        raise ValueError(f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
    return given


def _one_prompt(value: Any) -> Any:
    """A text, or its tokens; OpenAI's list of one text is that text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list) and any(isinstance(one, str | list) for one in value):
        raise ValueError(f"must be one text, not {len(value)}: send a request for each")
    if not isinstance(value, str) and not _is_token_list(value):
        raise ValueError("must be a text or a list of token ids")
    if not value:
        raise ValueError("must not be empty")
    return value


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class GenerationBody(BaseModel):
    """What `/v1/chat/completions` and `/v1/completions` share. `null` means "not given" everywhere."""

    model_config = ConfigDict(extra="allow")  # `screened` has refused what matters; the rest is named in a header

    model: str | None = None
    persona: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1: no bound
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Int64 | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop_strings)] = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=0, le=1)] | None = None  # 0: a player waits; 1: ambient chatter
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    # Seconds from the request's arrival; without a token by then it is an error, after it the reply ends there.
    deadline_s: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = None

    @property
    def num_choices(self) -> int:
        """Answers to give. Raises `SettingError` for a `best_of` that would have more made than given."""
        number = self.n or 1
        if self.best_of not in (None, number):
            raise SettingError("best_of", f"must be n ({number}) or left out: every answer that is made is given")
        return number

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as OpenAI means it: one string or several."""
        assert not isinstance(self.stop, str), "_stop_strings made it a list"
        return tuple(self.stop or ())

    @property
    def ignored(self) -> list[str]:
        """Fields that were sent and have no effect, without those that never matter."""
        return sorted(set(self.model_extra or ()) - HARMLESS - set(REFUSED))


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[
        list[Annotated[Message, BeforeValidator(_message_without_content)]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled", "auto"] | None = None  # auto: the oldest turns are dropped where all do not fit

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The token limit and the name it was sent under. Raises `SettingError` where two names disagree."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise SettingError("max_tokens", f"is {old}, and max_completion_tokens is {new}: send one of them")
        return ("max_completion_tokens", new) if new is not None else ("max_tokens", old)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report a token. Raises `SettingError` for top_logprobs without logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise SettingError("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


# --- fields of other servers --------------------------------------------------------------------------------

# Accepted without a word: they change nothing about the text.
HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that is fine at `neutral` values and would silently change meaning at any other."""

    reason: str
    neutral: tuple[Any, ...] = ()

    def applies(self, value: Any) -> bool:
        """Whether this value asks for something."""
        return value is not None and not any(_same(value, one) for one in self.neutral)


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and bool(value == neutral)  # True is no 1


_NO_TOOLS = Refusal("is not supported: this server has no tools", ([], {}, "none", "auto"))
_NO_GRAMMAR = Refusal("is not supported: output cannot be constrained to a grammar or schema", ([], {}, ""))
_NO_TOKEN_SETS = Refusal("is not supported", ([], {}))
_NO_TEMPLATE = Refusal("is not supported: the base's own chat template is always used", ("", {}))

REFUSED: dict[str, Refusal] = {
    "use_beam_search": Refusal("is not supported", (False,)),
    "length_penalty": Refusal("is not supported", (1, 1.0)),
    "echo": Refusal("is not supported: the prompt is not repeated", (False,)),
    "suffix": Refusal("is not supported", ("",)),
    "logit_bias": Refusal("must be empty: biasing single tokens is not supported", ({}, [])),
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "web_search_options": _NO_TOOLS,
    "documents": Refusal("is not supported: put the text into a message", ([],)),
    "modalities": Refusal("must be ['text']", (["text"], [])),
    "audio": Refusal("is not supported"),
    "response_format": Refusal("must be {'type': 'text'}: output cannot be constrained", ({"type": "text"},)),
    "structured_outputs": _NO_GRAMMAR,
    "guided_json": _NO_GRAMMAR,
    "guided_regex": _NO_GRAMMAR,
    "guided_choice": _NO_GRAMMAR,
    "guided_grammar": _NO_GRAMMAR,
    "grammar": _NO_GRAMMAR,
    "json_schema": _NO_GRAMMAR,
    "stop_token_ids": _NO_TOKEN_SETS,
    "bad_words": _NO_TOKEN_SETS,
    "allowed_token_ids": _NO_TOKEN_SETS,
    "prompt_logprobs": Refusal("is not supported", (0, False)),
    "prompt_embeds": Refusal("is not supported"),
    "max_completion_tokens": Refusal("is a field of chats: here it is max_tokens"),
    "truncation": Refusal("is for chats: a text is never cut", ("disabled",)),
    "truncate_prompt_tokens": Refusal("is not supported: a prompt is never cut silently", (-1,)),
    "include_stop_str_in_output": Refusal("is not supported", (False,)),
    "skip_special_tokens": Refusal("must be true", (True,)),
    "chat_template": _NO_TEMPLATE,
    "chat_template_kwargs": _NO_TEMPLATE,
    "add_generation_prompt": Refusal("must be true", (True,)),
    "continue_final_message": Refusal("is not supported", (False,)),
}
_MISSPELT = 0.85  # similarity from which an unknown field is taken for a slip; max_new_tokens/max_tokens is 0.83


def screened(model: type[GenerationBody], raw: dict[str, Any]) -> dict[str, Any]:
    """Refuse fields that would silently change meaning, and misspelt ones.

    Other unknown fields pass, since every front end sends some of its own. Raises `SettingError`.
    """
    for name, value in raw.items():
        if name in model.model_fields:
            continue
        refusal = REFUSED.get(name)
        if refusal is not None and refusal.applies(value):
            raise SettingError(name, refusal.reason)
        if refusal is None and name not in HARMLESS:
            _refuse_misspelt(name, model.model_fields)
    return raw


def screened_chat(raw: dict[str, Any]) -> dict[str, Any]:
    """`screened` for ChatBody."""
    return screened(ChatBody, raw)


def screened_completion(raw: dict[str, Any]) -> dict[str, Any]:
    """`screened` for CompletionBody."""
    return screened(CompletionBody, raw)


def _refuse_misspelt(name: str, known: Iterable[str]) -> None:
    close = difflib.get_close_matches(name, [*known, *REFUSED], n=1, cutoff=_MISSPELT)
    if close:
        raise SettingError(name[:100], f"unknown field; did you mean {close[0]!r}?")
