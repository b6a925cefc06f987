"""The command line: what it says, what it writes, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_sculpting
import numpy as np
import pytest
import torch
from running_server import RunningServer, add_version, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import masquerade_pruner
from masquerade_engine.base import Base
from masquerade_engine.device_memory import DeviceMemory
from masquerade_masks import Attached, InsufficientMemory, Mask, MaskFile, MaskHeader, SettingError, SubNetwork
from masquerade_masks.mask_file import read
from masquerade_masks.registry import SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server import cli
from masquerade_server.cli.doctor import Verdict, examine
from masquerade_server.cli.persona_text import id_of, name_of, read_text
from masquerade_server.cli.progress import SculptDisplay, time_left
from masquerade_server.listening import CannotListen, PortInUse, bind, url_of
from masquerade_server.ready import pruner_data, shipped
from masquerade_server.settings import Settings

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("personas", "list", url=...)`: a command over a data directory of the test's own and the tiny base."""
    monkeypatch.setenv("MASQUERADE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MASQUERADE_CACHE_DIR", str(tiny_base_dir.parent / "cache"))
    monkeypatch.setenv("MASQUERADE_MODEL", str(tiny_base_dir))
    monkeypatch.setenv("MASQUERADE_DTYPE", "fp32")
    monkeypatch.setenv("COLUMNS", "120")

    def command(*arguments: str, url: str | None = None, input: str | None = None) -> Result:
        if url is not None:
            monkeypatch.setenv("MASQUERADE_URL", url)
        return CliRunner().invoke(cli.app, [str(one) for one in arguments], input=input)

    return command


def process(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`masquerade` as a shell runs it."""

    command = [sys.executable, "-c", "from masquerade_server.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ, timeout=60, check=False)


# --- help and errors


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["serve"],
        ["sculpt"],
        ["chat"],
        ["personas"],
        ["personas", "create"],
        ["export"],
        ["eval"],
        ["doctor"],
        ["bench"],
    ],
)
def test_every_command_explains_itself(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    if command in (["serve"], ["sculpt"], ["chat"], ["export"], ["eval"]):
        assert f"masquerade {command[0]}" in result.output  # an example


def test_help_needs_neither_torch_nor_the_server() -> None:
    code = (
        "import sys; from masquerade_server import cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi', 'uvicorn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = process("serve", "--port", str(port))
    assert found.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in found.stderr
    assert "--port" in found.stderr
    assert "Loading" not in found.stderr
    assert "Traceback" not in found.stderr


def test_a_wrong_setting_is_a_sentence_and_status_2(tmp_path: Path) -> None:
    config = tmp_path / "m.toml"
    config.write_text("prot = 1")
    found = process("serve", "--config", str(config))
    assert found.returncode == 2
    assert "did you mean 'port'" in found.stderr
    unusable = process("serve", "--port", "0", "--data-dir", str(config))
    assert unusable.returncode == 2
    assert "cannot be used" in unusable.stderr
    assert "Traceback" not in found.stderr + unusable.stderr


def test_no_server_is_a_sentence_and_status_1() -> None:
    found = process("chat", "pip", "hello", MASQUERADE_URL="http://127.0.0.1:9")
    assert found.returncode == 1
    assert "127.0.0.1:9" in found.stderr
    assert "Traceback" not in found.stderr


# --- listening


def test_binding() -> None:
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(bound, "0.0.0.0") == f"http://127.0.0.1:{port}"
        assert url_of(bound, "::1") == f"http://[::1]:{port}"
        with pytest.raises(PortInUse, match=str(port)):
            bind("127.0.0.1", port)
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(CannotListen, match="no-such-host"):
        bind("no-such-host.invalid", 0)


# --- against a running server


def test_listing_and_showing(run: Run, town: RunningServer) -> None:
    result = run("personas", url=town.url)
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert rows[0] == ["id", "name", "serves", "sparsity", "job"]
    assert rows[1][:4] == ["mira", "Mira", "version", "2"]
    assert rows[2] == ["plain", "Plain", "unpruned", "base", "25%"]
    shown = run("personas", "show", "mira", url=town.url).output
    assert "keeps a lighthouse" in shown
    assert "48 of 96 neurons a layer" in shown


def test_a_life_from_the_command_line(run: Run, town: RunningServer, tmp_path: Path) -> None:
    text = tmp_path / "swamp-witch.txt"
    text.write_text("A witch.")
    created = run("personas", "create", str(text), "--no-wait", "--preset", "smoke", url=town.url)
    assert created.exit_code == 0, created.output
    assert "swamp-witch answers" in created.output
    assert run("personas", "cancel", "swamp-witch").exit_code == 0
    for seed in (1, 2):
        add_version(town, "swamp-witch", "Swamp Witch", "A witch.", seed)
    mask = tmp_path / "witch.safetensors"
    assert run("personas", "download", "swamp-witch", str(mask), "--version", "1").exit_code == 0
    assert "version 1" in run("personas", "rollback", "swamp-witch", "1").output
    warmed = run("personas", "warm", "swamp-witch", "swamp-witch@dense", "--pin")
    assert warmed.exit_code == 0, warmed.output
    assert "swamp-witch is ready: version 1, " in warmed.output
    assert "swamp-witch@dense is ready: the unpruned base, " in warmed.output
    assert "version 3" in run("personas", "upload", "swamp-witch", str(mask)).output
    patched = run("personas", "update", "swamp-witch", "--name", "Nettie", "--no-sculpt")
    assert patched.exit_code == 0
    assert run("personas", "delete", "swamp-witch", input="n\n").exit_code == 1
    assert run("personas", "delete", "swamp-witch", "--yes").exit_code == 0
    assert "swamp-witch" not in run("personas").output


def test_one_question(run: Run, town: RunningServer) -> None:
    result = run("chat", "mira", "hello", "--max-tokens", "5", "--temperature", "0", url=town.url)
    assert result.exit_code == 0, result.output
    piped = run("chat", "mira", "-", "--max-tokens", "5", "--temperature", "0", input="hello")
    assert piped.output == result.output


def test_a_conversation_remembers_and_forgets(run: Run, town: RunningServer) -> None:
    lines = "hello\n\n/who\n/nonsense\n/forget\nhello\n/quit\n"
    result = run("chat", "mira", "--max-tokens", "3", "--temperature", "0", "--seed", "1", url=town.url, input=lines)
    assert result.exit_code == 0, result.output
    assert "keeps a lighthouse" in result.output
    assert "A new conversation" in result.output
    by_end_of_file = run("chat", "mira", "--max-tokens", "3", input="hello\n")
    assert by_end_of_file.exit_code == 0


def test_a_misspelt_persona_is_told_before_anyone_types(run: Run, town: RunningServer) -> None:
    result = run("chat", "mirra", url=town.url, input="")
    assert "mirra" in str(result.exception)


# --- on this machine


def test_sculpting_writes_mask_report_and_examples_and_publishes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masquerade_pruner, "sculpt", fake_sculpting.sculpt)
    text = tmp_path / "old-nettie.txt"
    text.write_text("A witch.\n")
    out = tmp_path / "masks"
    result = run("sculpt", str(text), "--preset", "smoke", "-o", str(out), "--publish")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "old-nettie.examples.jsonl",
        "old-nettie.report.json",
        "old-nettie.safetensors",
    ]
    found = read(out / "old-nettie.safetensors")
    assert found.header.settings["preset"] == "smoke"
    assert json.loads((out / "old-nettie.report.json").read_text()) == {"kept": 48, "cast": 0}
    with SQLiteRegistry(tmp_path / "data" / "registry.sqlite") as registry:
        persona = registry.get_persona("old-nettie")
        assert (persona.name, persona.text, persona.version) == ("Old Nettie", "A witch.", 1)
    again = run("sculpt", str(text), "--seed", "2", "-o", str(out), "--publish")
    assert "version 2" in again.output


def test_a_sculpt_that_is_interrupted_keeps_its_checkpoints(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        args[2].mkdir(parents=True)
        (args[2] / "step.json").write_text(json.dumps({"step": 15}))
        raise KeyboardInterrupt

    monkeypatch.setattr(masquerade_pruner, "sculpt", interrupted)
    text = tmp_path / "witch.txt"
    text.write_text("A witch.")
    assert run("sculpt", str(text), "-o", str(tmp_path / "o")).exit_code != 0
    monkeypatch.setattr(masquerade_pruner, "sculpt", fake_sculpting.sculpt)
    result = run("sculpt", str(text), "-o", str(tmp_path / "o"))
    assert "from 15" in result.output


def test_a_sculpt_gets_the_configured_teacher_where_it_asks_for_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masquerade_pruner, "sculpt", fake_sculpting.sculpt)
    monkeypatch.setenv("MASQUERADE_TEACHER_URL", "http://127.0.0.1:9/v1")
    text = tmp_path / "witch.txt"
    text.write_text("A witch.")
    reports = {}
    for teacher in ("base", "remote"):
        out = tmp_path / teacher
        found = run("sculpt", str(text), "--teacher", teacher, "--teacher-model", "scribe", "-o", str(out))
        assert found.exit_code == 0, found.output
        reports[teacher] = json.loads((out / "witch.report.json").read_text())
    assert (reports["base"].get("teacher_model"), reports["remote"]["teacher_model"]) == (None, "scribe")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--sparsity", "1"], "sparsity"),
        (["--sparsity", "nan"], "sparsity"),
        (["--preset", "best"], "preset"),
        (["--teacher", "oracle"], "teacher"),
        (["--teacher", "remote", "--preset", "smoke"], "teacher"),
        (["--teacher", "remote", "--teacher-url", "http://127.0.0.1:9/v1"], "teacher_model"),
        (["--id", "../x"], "id"),
        (["--name", " "], "name"),
    ],
)
def test_wrong_sculpts(run: Run, tmp_path: Path, arguments: list[str], field: str) -> None:
    text = tmp_path / "witch.txt"
    text.write_text("A witch.")
    result = run("sculpt", str(text), *arguments)
    assert isinstance(result.exception, SettingError)
    assert result.exception.field == field


def test_a_sculpt_that_does_not_fit_is_refused_before_it_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = DeviceMemory(free=100_000_000, total=100_000_000)
    monkeypatch.setattr(sys.modules["masquerade_pruner.estimate"], "device_memory", lambda device: little)
    text = tmp_path / "witch.txt"
    text.write_text("A witch.")
    ways = ["--device", "cpu", "--checkpointing", "off", "--micro-batch", "16"]
    result = run("sculpt", str(text), *ways, "-o", str(tmp_path / "o"))
    assert isinstance(result.exception, InsufficientMemory)
    assert "this device (cpu) has 0.1 GB free" in str(result.exception)
    assert not list((tmp_path / "o").glob("witch*"))


def test_persona_texts(tmp_path: Path) -> None:
    path = tmp_path / "swamp_witch.txt"
    path.write_bytes(b"\xef\xbb\xbfA witch.\r\n")
    assert read_text(str(path)) == "A witch."
    assert (name_of(str(path), None), name_of(str(path), "Nettie")) == ("Swamp Witch", "Nettie")
    assert (id_of("Élise", None), id_of("Élise", "e")) == ("elise", "e")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="not UTF-8"):
        read_text(str(path))
    path.write_text(" \n")
    with pytest.raises(SettingError, match="is empty"):
        read_text(str(path))
    with pytest.raises(SettingError, match="cannot be read"):
        read_text(str(tmp_path / "nowhere.txt"))
    with pytest.raises(SettingError, match="--id"):
        id_of("李明", None)
    with pytest.raises(SettingError, match="standard input"):
        name_of("-", None)


def test_exports(run: Run, town: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_DATA_DIR", str(town.state.settings.data_dir))
    assert run("export", "mira", str(tmp_path / "hf"), "--type", "bf16").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.intermediate_size, model.dtype) == (48, torch.bfloat16)
    assert "Mira keeps a lighthouse." in AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    assert run("export", "mira", str(tmp_path / "peft"), "--format", "peft").exit_code == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    assert run("export", "mira", str(tmp_path / "mira.json"), "-f", "keep-index", "--version", "1").exit_code == 0
    indices = json.loads((tmp_path / "mira.json").read_text())
    assert (len(indices), len(indices[0])) == (3, 48)
    again = run("export", "mira", str(tmp_path / "hf"))
    assert isinstance(again.exception, SettingError)
    assert "plain" in str(run("export", "plain", str(tmp_path / "x")).exception)


def test_exports_from_a_mask_file(
    run: Run, town: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASQUERADE_DATA_DIR", str(town.state.settings.data_dir))
    mask, text = tmp_path / "mira.safetensors", tmp_path / "mira.txt"
    assert run("export", "mira", str(mask), "--format", "safetensors").exit_code == 0
    assert "every chat must bring it" in run("export", str(mask), str(tmp_path / "without")).output
    text.write_text("Mira keeps a lighthouse.")
    told = run("export", str(mask), str(tmp_path / "with"), "--text", str(text))
    assert told.exit_code == 0
    assert "prompt" not in told.output
    other = run("export", str(mask), str(tmp_path / "other"), "--text", str(text), "--name", "Ada")
    assert "learned under another prompt" in other.output
    folders = {name: AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("without", "with")}
    assert ("lighthouse" in folders["with"], "lighthouse" in folders["without"]) == (True, False)


def test_exports_take_the_attached_weights_along(
    run: Run, tiny_base: Base, make_attached: Callable[..., Attached], tmp_path: Path
) -> None:
    shape = tiny_base.shape
    kept = np.tile(np.arange(0, 96, 2, dtype=np.int32), (shape.num_layers, 1))
    subnetwork = SubNetwork(
        tiny_base.fingerprint,
        shape,
        Mask.from_kept_indices(kept, shape.intermediate_size),
        weights=make_attached("lora", shape, 48),
    )
    files = PersonaFiles(tmp_path / "files")
    files.publish_version("ada", 1, MaskFile(subnetwork, MaskHeader("ada", 1, "lora", "0" * 64)))
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "ada.safetensors"
    assert run("export", str(files.mask_path("ada", 1)), str(copy), "-f", "safetensors").exit_code == 0
    assert run("export", str(copy), str(tmp_path / "peft"), "-f", "peft").exit_code == 0
    assert (tmp_path / "peft" / "checkpoint" / "config.json").is_file()
    told = run("export", str(copy), str(tmp_path / "ada.json"), "-f", "keep-index")
    assert "attached weights are left out" in told.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "gguf"], "no GGUF file"),
        (["--format", "gguf", "--type", "bf16"], "there are base, f16, q8_0"),
        (["--format", "keep-index", "--type", "f16"], "there are none"),
        (["--text", "mira.txt"], "is for mask files"),
    ],
)
def test_exports_that_cannot_be(
    run: Run,
    town: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.setenv("MASQUERADE_DATA_DIR", str(town.state.settings.data_dir))
    refused = run("export", "mira", str(tmp_path / "out"), *arguments).exception
    assert isinstance(refused, SettingError)
    assert reason in str(refused)
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.real_model
def test_exports_a_gguf_file(run: Run, bundled_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_MODEL", "smollm2-135m-instruct")
    monkeypatch.setenv("MASQUERADE_CACHE_DIR", str(bundled_base.path.parent.parent))
    pip = next(one for one in shipped(pruner_data()) if one.id == "pip")
    text, out = tmp_path / "pip.txt", tmp_path / "pip.gguf"
    text.write_text(pip.text)
    told = run("export", str(pip.mask), str(out), "--format", "gguf", "--text", str(text))
    assert told.exit_code == 0, told.output
    assert f"llama-cli -m {out}" in told.output
    assert "Note" not in told.output
    assert out.stat().st_size < bundled_base.source.stat().st_size


def test_the_doctor_is_content(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_PORT", "0")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for subject in ("python", "torch", "device", "model", "registry", "port", "data directory"):
        assert f"{subject}:" in result.output


def test_the_doctor_finds_what_is_broken(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_PROT", "1")
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("doctor", "--model", "nowhere.gguf", "--data-dir", str(in_the_way), "--port", port)
    assert result.exit_code == 1
    for word in ("MASQUERADE_PROT", "nowhere.gguf", "cannot be written", "in use by another program", "4 of these"):
        assert word in result.output


def test_the_doctor_knows_its_own_server(town: RunningServer, tiny_base_dir: Path) -> None:
    port = int(town.url.rsplit(":", 1)[1])
    cache = tiny_base_dir.parent / "cache"
    settings = Settings(port=port, data_dir=town.state.settings.data_dir, cache_dir=cache, model=str(tiny_base_dir))
    *_, last = examine(settings)
    assert last.verdict is Verdict.FINE
    assert "a Masquerade serving" in last.found


# --- displays


def test_the_display_tells_stage_step_loss_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with SculptDisplay("mira") as display:
        display.show("select", 0, 1, message="select: starting")
        for step in range(50):
            display.show("learn", step, 50, eta_s=600 - step, loss=1.25, message="learning the mask")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["mira: select 0/1", "mira: learn (learning the mask) 0/50 loss 1.250 10 min left"]


@pytest.mark.parametrize(("eta", "text"), [(None, ""), (12.4, "12 s left"), (100, "2 min left")])
def test_time_left(eta: float | None, text: str) -> None:
    assert time_left(eta) == text


def test_serving_announces_itself_with_an_example(tmp_path: Path, tiny_base_dir: Path) -> None:
    command = [sys.executable, "-c", "from masquerade_server.cli import main; main()", "serve", "--port", "0"]
    flags = ["--data-dir", str(tmp_path), "--model", str(tiny_base_dir), "--dtype", "fp32"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = [server.stdout.readline() for _ in range(5)]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert said[0].startswith("Masquerade serves ")
    assert "curl http://127.0.0.1:" in said[2]
    body = json.loads(said[3].split("'")[1])
    assert body["messages"]


def test_watching_from_the_command_line(run: Run, town: RunningServer, tmp_path: Path) -> None:
    text = tmp_path / "watched.txt"
    text.write_text("A watchman.")
    registry = town.state.registry

    def work() -> None:
        job = wait_until(lambda: registry.claim_job("tester", 60.0), "the job")
        registry.report_progress(job.id, "learn", 1, 2, 3.0, {"loss": 0.5, "message": "learning the mask"})
        registry.finish_job(job.id, "failed", "the disk is full", worker="tester")

    worker = threading.Thread(target=work)
    worker.start()
    result = run("personas", "create", str(text), url=town.url)
    worker.join()
    assert "learn (learning the mask) 1/2 loss 0.500 3 s left" in result.output
    assert "the disk is full" in str(result.exception)
