"""How much memory a device has for this process: the machine's, within a container's limits, or a GPU's."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes."""

    free: int  # that this process can have; what it holds already counts as free
    total: int


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of the device that a base is on."""
    if device.type == "cuda":
        import torch  # noqa: PLC0415  (the machine's own memory is asked for by processes without torch)

        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(free + torch.cuda.memory_reserved(device), total)
    return host_memory()


def host_memory(cgroups: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> DeviceMemory:
    """The machine's memory, or less where a control group (a container) allows less."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit, used in _limits(cgroups, groups):
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return DeviceMemory(free + psutil.Process().memory_info().rss, total)


def give_memory_back(device: torch.device) -> None:
    """Return what was freed to the system, or to the GPU: allocators keep it for themselves.

    After a learning step of 700 tokens on the bundled model glibc held 770 MB that nobody used.
    """
    if device.type == "cuda":
        import torch  # noqa: PLC0415

        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)


def _limits(cgroups: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every group that this process is in; page cache that can go is no use."""
    for folder in _folders(cgroups, groups):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                allowed = (folder / limit).read_text().strip()
                if allowed != "max":
                    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield int(allowed), int((folder / usage).read_text()) - int(statistics.get(cache, 0))
            except (OSError, ValueError):  # another version of control groups, or none
                continue


def _folders(cgroups: Path, groups: Path) -> Iterator[Path]:
    """The groups of this process and those around them: a container may see its own as the root."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            root = cgroups if number == "0" else cgroups / "memory"
            group = Path(name.lstrip("/"))
            yield from (root / one for one in (group, *group.parents))
