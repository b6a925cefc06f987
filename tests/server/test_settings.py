from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from masquerade_masks import SettingError
from masquerade_server import __version__
from masquerade_server.jobs import WorkerConfig
from masquerade_server.settings import Settings, TeacherSettings, default_data_dir, resolve_settings, unknown_environ


def resolve(tmp_path: Path, toml: str | None = None, environ: dict[str, str] | None = None, **flags: Any) -> Settings:
    config = None
    if toml is not None:
        config = tmp_path / "masquerade.toml"
        config.write_text(toml)
    return resolve_settings(flags, config=config, environ=environ or {})


def test_defaults() -> None:
    settings = resolve_settings({}, environ={})
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, "smollm2-135m-instruct")
    assert settings.data_dir == default_data_dir()
    assert settings.cache_dir == settings.data_dir / "cache"
    assert settings.api_key is None


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    toml = 'port = 1\nhost = "file"\ndtype = "fp32"\n'
    environ = {"MASQUERADE_PORT": "2", "MASQUERADE_HOST": "environment"}
    settings = resolve(tmp_path, toml, environ, port=3)
    assert (settings.port, settings.host, settings.dtype) == (3, "environment", "fp32")
    assert settings.device == "auto"


def test_a_flag_that_was_not_given_is_none_and_hides_nothing(tmp_path: Path) -> None:
    assert resolve(tmp_path, "port = 1", port=None).port == 1


def test_a_switch_is_turned_on_and_off_from_any_source(tmp_path: Path) -> None:
    assert not resolve(tmp_path).enforce_eager
    assert resolve(tmp_path, "enforce_eager = true").enforce_eager
    assert resolve(tmp_path, environ={"MASQUERADE_ENFORCE_EAGER": "1"}).enforce_eager
    assert not resolve(tmp_path, "enforce_eager = true", {"MASQUERADE_ENFORCE_EAGER": "false"}).enforce_eager
    assert not resolve(tmp_path, environ={"MASQUERADE_ENFORCE_EAGER": "true"}, enforce_eager=False).enforce_eager


def test_the_cache_follows_the_data_directory_unless_set(tmp_path: Path) -> None:
    assert resolve(tmp_path, data_dir=tmp_path).cache_dir == tmp_path / "cache"
    environ = {"MASQUERADE_CACHE_DIR": "/elsewhere", "MASQUERADE_DATA_DIR": str(tmp_path)}
    assert resolve(tmp_path, environ=environ).cache_dir == Path("/elsewhere")


def test_sculpting_is_on_the_serving_device_unless_set(tmp_path: Path) -> None:
    assert resolve(tmp_path, device="cuda:1").sculpt_device == "cuda:1"
    environ = {"MASQUERADE_SCULPT_DEVICE": "cpu", "MASQUERADE_DEVICE": "cuda", "MASQUERADE_SCULPT_MICRO_BATCH": "4"}
    settings = resolve(tmp_path, environ=environ)
    assert (settings.device, settings.sculpt_device) == ("cuda", "cpu")
    told = WorkerConfig.of(settings)
    assert (told.device, told.checkpointing, told.micro_batch) == ("cpu", "auto", 4)


def test_the_config_file_is_found_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("max_queue = 7")
    assert resolve_settings({}, environ={"MASQUERADE_CONFIG": str(path)}).max_queue == 7


def test_an_empty_variable_is_an_unset_one(tmp_path: Path) -> None:
    assert resolve(tmp_path, environ={"MASQUERADE_API_KEY": "", "MASQUERADE_PORT": ""}).port == 8000


@pytest.mark.parametrize(
    ("toml", "field", "says"),
    [
        ("prot = 1", "prot", "did you mean 'port'"),
        ("zzz = 1", "zzz", "the settings are"),
        ("[server]\nport = 1", "server", "unknown option"),
        ("port = 70000", "port", "from 0 to 65535"),
        ("port = 1.5", "port", "1.5"),
        ("port = true", "port", "True"),
        ('port = "http"', "port", "'http'"),
        ("workers = 2", "workers", "from 0 to 1"),
        ('dtype = "int4"', "dtype", "auto, bf16"),
        ('host = "  "', "host", "non-empty"),
        ('device = "cuda:x"', "device", "cuda:N"),
        ('enforce_eager = "perhaps"', "enforce_eager", "true, false"),
        ("enforce_eager = 2", "enforce_eager", "2"),
        ('sculpt_checkpointing = "maybe"', "sculpt_checkpointing", "auto, on, off"),
        ("data_dir = 3", "data_dir", "3"),
        ("port =", "config", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_source(tmp_path: Path, toml: str, field: str, says: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve(tmp_path, toml)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "masquerade.toml" in str(caught.value)


def test_a_wrong_variable_and_a_wrong_flag_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="MASQUERADE_PORT"):
        resolve(tmp_path, environ={"MASQUERADE_PORT": "tcp://10.0.0.1:80"})
    with pytest.raises(SettingError, match="--max-num-seqs"):
        resolve(tmp_path, max_num_seqs=0)


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.toml cannot be read"):
        resolve_settings({}, config=tmp_path / "nowhere.toml", environ={})


def test_a_key_is_not_shown() -> None:
    assert "hunter2" not in repr(Settings(api_key="hunter2"))


# --- the teacher


def test_a_teacher_is_configured_from_any_source(tmp_path: Path) -> None:
    toml = 'teacher_url = "https://teach.example/v1/"\nteacher_model = "file"\nteacher_concurrency = 2\n'
    environ = {"MASQUERADE_TEACHER_MODEL": "environment", "MASQUERADE_TEACHER_API_KEY": "hunter2"}
    settings = resolve(tmp_path, toml, environ, teacher_timeout_s=9)
    assert settings.teacher == TeacherSettings("https://teach.example/v1", "environment", "hunter2", 2, 9)
    assert settings.teacher.host == "teach.example"
    assert "hunter2" not in repr(settings) + repr(settings.teacher)


def test_there_is_no_teacher_by_default() -> None:
    assert resolve_settings({}, environ={}).teacher is None
    assert resolve_settings({"teacher_api_key": "k"}, environ={}).teacher is None


@pytest.mark.parametrize(("given", "missing"), [("teacher_url", "teacher_model"), ("teacher_model", "teacher_url")])
def test_half_a_teacher_is_refused(given: str, missing: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve_settings({given: "http://127.0.0.1:9/v1"}, environ={})
    assert caught.value.field == missing
    assert given in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "teach.example/v1",
        "ftp://teach.example",
        "https://",
        "https://me:hunter2@teach.example/v1",
        "https://teach.example/v1?key=hunter2",
        "https://teach.example/v1#hunter2",
        "https://teach.example:hunter2/v1",
        "https://teach example/hunter2",
    ],
)
def test_a_teachers_url_is_an_address_and_nothing_else(url: str) -> None:
    with pytest.raises(SettingError, match="must be like https://") as caught:
        resolve_settings({"teacher_url": url, "teacher_model": "m"}, environ={})
    assert caught.value.field == "teacher_url"
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["hunter2 hunter2", "hunter2\nX-Evil: 1", "hünter2", 2, ""])
def test_a_wrong_key_is_refused_unseen(tmp_path: Path, key: Any) -> None:
    with pytest.raises(SettingError, match="printable ASCII") as caught:
        resolve_settings({"teacher_api_key": key}, environ={})
    assert caught.value.field == "teacher_api_key"
    assert "unter2" not in str(caught.value)


def test_misspelt_variables_are_noticed() -> None:
    environ = {"MASQUERADE_PROT": "1", "MASQUERADE_PORT": "1", "MASQUERADE_URL": "x", "PATH": "y"}
    (sentence,) = unknown_environ(environ)
    assert "MASQUERADE_PROT" in sentence
    assert "did you mean 'MASQUERADE_PORT'" in sentence


def test_the_version_is_the_projects() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text("utf-8"))["project"]["version"] == __version__
