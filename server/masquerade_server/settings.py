"""Settings: flags, then `MASQUERADE_*` variables, then a TOML file, then defaults; resolved once."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from masquerade_masks import SettingError

ENV_PREFIX = "MASQUERADE_"
CONFIG_ENV = "MASQUERADE_CONFIG"
# Variables of this prefix that are read elsewhere: the config's own path, what the Python client reads, and `eval`.
_OTHER_ENV = frozenset(
    {
        CONFIG_ENV,
        "MASQUERADE_URL",
        "MASQUERADE_BASE_URL",
        "MASQUERADE_JUDGE_URL",
        "MASQUERADE_JUDGE_MODEL",
        "MASQUERADE_JUDGE_API_KEY",
    }
)


def default_data_dir() -> Path:
    """The platform's folder for user data: XDG on Linux, Application Support on macOS, AppData on Windows."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "masquerade"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "masquerade"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "masquerade"


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """A remote teacher: an OpenAI-compatible chat endpoint that the operator trusts with persona texts."""

    url: str  # what the SDKs call the base URL; /chat/completions is appended
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8  # requests at once
    timeout_s: float = 120  # for one answer

    @property
    def host(self) -> str:
        """What errors and logs call it: host and port."""
        return urlsplit(self.url).netloc


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server process runs with. Every value is resolved: no None stands for "look elsewhere"."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    data_dir: Path = field(default_factory=default_data_dir)
    cache_dir: Path = field(default_factory=lambda: default_data_dir() / "cache")
    model: str = "smollm2-135m-instruct"
    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"  # of the weights that are served
    enforce_eager: bool = False  # no CUDA graphs
    max_num_seqs: int = 32
    max_model_len: int | None = None  # tokens; None: the base's own context length
    max_queue: int = 256
    kv_cache_mb: int = 8192  # MiB: keys and values of the chats that run
    prefix_cache_mb: int = 512  # MiB: those of prompts that may come again
    pack_cache_mb: int = 512  # MiB: weights of busy personas and casts
    load_timeout_s: int = 30  # that a chat waits for its persona's own weights
    api_key: str | None = field(default=None, repr=False)
    workers: int = 1  # sculpt worker processes: 0 or 1
    sculpt_device: str = "auto"  # where personas are sculpted; by default where they are served
    sculpt_checkpointing: str = "auto"  # auto: where the memory is needed
    sculpt_micro_batch: int = 0  # branches of a learning step at once; 0: as many as fit
    threads: int = 0  # of the engine; 0: every core this process may use
    log_level: str = "info"
    teacher_url: str | None = None  # None: no remote teacher
    teacher_model: str | None = None
    teacher_api_key: str | None = field(default=None, repr=False)
    teacher_concurrency: int = 8  # requests at once
    teacher_timeout_s: int = 120  # for one answer

    @property
    def teacher(self) -> TeacherSettings | None:
        """The remote teacher, where there is one."""
        if self.teacher_url is None or self.teacher_model is None:
            return None
        return TeacherSettings(
            self.teacher_url,
            self.teacher_model,
            self.teacher_api_key,
            self.teacher_concurrency,
            self.teacher_timeout_s,
        )


def resolve_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Merge the four sources into one `Settings`.

    `flags` are by field name; None means "not given". Raises `SettingError` naming the setting and its
    source.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    merged: dict[str, Any] = {}
    for name, (raw, source) in (_from_file(config, environ) | _from_environ(environ)).items():
        merged[name] = _convert(name, raw, source)
    for name, value in given.items():
        merged[name] = _convert(name, value, f"--{name.replace('_', '-')}")
    data_dir = merged.setdefault("data_dir", default_data_dir())
    merged.setdefault("cache_dir", data_dir / "cache")
    merged.setdefault("sculpt_device", merged.get("device", "auto"))
    for name, other in (("teacher_url", "teacher_model"), ("teacher_model", "teacher_url")):
        if name not in merged and other in merged:
            raise SettingError(name, f"is needed beside {other}: the two name the remote teacher")
    return Settings(**merged)


def unknown_environ(environ: Mapping[str, str]) -> list[str]:
    """Sentences about `MASQUERADE_*` variables that nothing reads: most are misspellings."""
    known = {ENV_PREFIX + name.upper() for name in _CONVERTERS} | _OTHER_ENV
    strays = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)
    return [f"the environment variable {name} is not a setting{_suggestion(name, known)}" for name in strays]


def _from_file(config: Path | None, environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    path = config or (Path(environ[CONFIG_ENV]) if environ.get(CONFIG_ENV) else None)
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.expanduser().read_text("utf-8"))
    except OSError as error:
        raise SettingError("config", f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # TOML and UTF-8 errors alike
        raise SettingError("config", f"{path} is not valid TOML: {error}") from error
    for name in table:
        if name not in _CONVERTERS:
            raise SettingError(name, f"unknown option in {path}{_suggestion(name, _CONVERTERS)}")
    return {name: (value, str(path)) for name, value in table.items()}


def _from_environ(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    named = {name: ENV_PREFIX + name.upper() for name in _CONVERTERS}
    # An empty variable is an unset one: compose files pass `FOO=${FOO:-}`.
    return {name: (environ[key], key) for name, key in named.items() if environ.get(key)}


def _suggestion(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the settings are {', '.join(sorted(known))}"


def _convert(name: str, raw: Any, source: str) -> Any:
    try:
        return _CONVERTERS[name](raw)
    except (TypeError, ValueError) as error:
        raise SettingError(name, f"{error} (from {source})") from error


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(f"{raw!r} is not a non-empty string")
    return raw.strip()


def _secret(raw: Any) -> str:
    """Never shown, not even where it is wrong."""
    if not isinstance(raw, str) or not re.fullmatch(r"[!-~]+", raw.strip()):
        raise ValueError("must be printable ASCII without spaces")
    return raw.strip()


def _endpoint(raw: Any) -> str:
    """A base URL, not shown where it is wrong: it may hold a password."""
    refusal = ValueError("must be like https://host:port/v1, without a user, a query or a fragment")
    if not isinstance(raw, str) or not raw.strip().isprintable():
        raise refusal
    url = raw.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refusal from None
    plain = not (parts.query or parts.fragment or "@" in parts.netloc or " " in url)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not plain:
        raise refusal
    return url


def _folder(raw: Any) -> Path:
    return Path(raw if isinstance(raw, Path) else _text(raw)).expanduser().absolute()


def _integer(least: int, most: int, hint: str = "") -> Callable[[Any], int]:
    def convert(raw: Any) -> int:
        refusal = ValueError(f"{raw!r} is not a whole number from {least} to {most}{hint}")
        if isinstance(raw, bool | float):
            raise refusal
        try:
            number = int(raw)
        except ValueError:
            raise refusal from None
        if not least <= number <= most:
            raise refusal
        return number

    return convert


def _switch(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if raw not in ("1", "true", "0", "false"):
        raise ValueError(f"{raw!r} is not one of true, false, 1, 0")
    return raw in ("1", "true")


def _one_of(*choices: str) -> Callable[[Any], str]:
    def convert(raw: Any) -> str:
        if raw not in choices:
            raise ValueError(f"{raw!r} is not one of {', '.join(choices)}")
        return str(raw)

    return convert


def _device(raw: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", raw):
        raise ValueError(f"{raw!r} is not one of auto, cpu, cuda, cuda:N")
    return raw


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "host": _text,
    "port": _integer(0, 65535),
    "data_dir": _folder,
    "cache_dir": _folder,
    "model": _text,
    "dtype": _one_of("auto", "bf16", "bfloat16", "fp32", "float32"),
    "device": _device,
    "quantization": _one_of("none", "int8"),
    "enforce_eager": _switch,
    "max_num_seqs": _integer(1, 4096),
    "max_model_len": _integer(16, 10_000_000, " (tokens)"),
    "max_queue": _integer(1, 100_000),
    "kv_cache_mb": _integer(1, 10_000_000, " (MiB)"),
    "prefix_cache_mb": _integer(0, 10_000_000, " (MiB)"),
    "pack_cache_mb": _integer(0, 10_000_000, " (MiB)"),
    "load_timeout_s": _integer(1, 3600, " (seconds that a chat waits for its persona's own weights)"),
    "api_key": _text,
    "workers": _integer(0, 1, " (sculpt worker processes beside this server)"),
    "sculpt_device": _device,
    "sculpt_checkpointing": _one_of("auto", "on", "off"),
    "sculpt_micro_batch": _integer(0, 4096, " (0: as many branches as fit)"),
    "threads": _integer(0, 1024, " (0: every core)"),
    "log_level": _one_of("debug", "info", "warning", "error"),
    "teacher_url": _endpoint,
    "teacher_model": _text,
    "teacher_api_key": _secret,
    "teacher_concurrency": _integer(1, 1000, " (requests at once)"),
    "teacher_timeout_s": _integer(1, 3600, " (seconds for one answer)"),
}
assert set(_CONVERTERS) == {one.name for one in fields(Settings)}
