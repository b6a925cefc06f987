"""What a process may have of the machine's memory, inside containers too."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from masquerade_engine.device_memory import host_memory

GB = 1000**3


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


@pytest.fixture
def free() -> int:
    """Bytes that a limit below the machine's own leaves: what this process holds counts as free."""
    return psutil.Process().memory_info().rss


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    found = host_memory(tmp_path, tmp_path / "none")
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free <= found.total


def test_the_tightest_group_of_version_two_counts_and_page_cache_does_not(tmp_path: Path, free: int) -> None:
    group(tmp_path, {"cgroup.controllers": "memory"})
    used = {"memory.current": str(GB), "memory.stat": f"anon 1\ninactive_file {GB // 2}"}
    group(tmp_path / "box", {"memory.max": str(2 * GB), **used})
    group(tmp_path / "box" / "job", {"memory.max": "max", **used})
    (tmp_path / "self").write_text("0::/box/job\n")
    found = host_memory(tmp_path, tmp_path / "self")
    assert found.total == 2 * GB
    assert found.free == pytest.approx(3 * GB // 2 + free, rel=0.05)


def test_a_group_of_version_one_counts(tmp_path: Path, free: int) -> None:
    group(
        tmp_path / "memory" / "job",
        {
            "memory.limit_in_bytes": str(GB),
            "memory.usage_in_bytes": str(3 * GB),
            "memory.stat": f"total_inactive_file {GB}",
        },
    )
    (tmp_path / "self").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    found = host_memory(tmp_path, tmp_path / "self")
    assert found.total == GB
    assert found.free == pytest.approx(free, rel=0.05)  # over its limit: nothing more is to be had
