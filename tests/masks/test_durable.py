from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from masquerade_masks import MaskFile, StorageFull, durable, mask_file, write_json_atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write_atomic(path, b"old")
    durable.write_atomic(path, b"")
    durable.write_atomic(path, b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000
    assert list(tmp_path.iterdir()) == [path]


def test_data_and_directory_are_flushed_and_in_that_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    durable.write_atomic(tmp_path / "file", b"data")
    expected = ["file", "rename", "directory"] if sys.platform == "linux" else ["file", "rename"]
    assert calls[: len(expected)] == expected


def test_a_full_disk_leaves_the_old_mask_and_nothing_else(
    tmp_path: Path, make_mask_file: Callable[..., MaskFile], full_disk: Callable[[], None]
) -> None:
    path = tmp_path / "mask.safetensors"
    old, new = make_mask_file(1), make_mask_file(2, seed=1)
    mask_file.write(path, old)
    full_disk()
    with pytest.raises(StorageFull) as refused:
        mask_file.write(path, new)
    assert refused.value.path == str(path)
    assert refused.value.needed_bytes == len(mask_file.encode(new))
    assert mask_file.read(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    full_disk()
    with pytest.raises(StorageFull, match="no space is left to write"):
        durable.write_atomic(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="Input/output"):
        durable.write_atomic(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_real_limit_on_file_size_is_a_full_disk(
    tmp_path: Path, run_python: Callable[..., subprocess.Popen[str]]
) -> None:
    code = """
import resource, sys
from pathlib import Path
from masquerade_masks import StorageFull, durable
path = Path(sys.argv[1])
durable.write_atomic(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    durable.write_atomic(path, b"x" * 5000)
except StorageFull as error:
    print(error.needed_bytes, path.read_bytes(), [entry.name for entry in path.parent.iterdir()])
"""
    child = run_python(code, tmp_path / "file")
    assert child.communicate(timeout=60)[0] == "5000 b'old' ['file']\n"
    assert child.returncode == 0


def test_json_is_standard_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json_atomic(path, {"kl": 0.5, "loss": float("nan"), "all": (1, float("inf")), "name": "Ærø", 3: None})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kl": 0.5,
        "loss": None,
        "all": [1, None],
        "name": "Ærø",
        "3": None,
    }
    assert "Ærø" in text
