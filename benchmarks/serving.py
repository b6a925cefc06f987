"""A real `masquerade serve` for a benchmark: own port, own data directory, stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from masquerade_client import APIConnectionError, Masquerade, ServerError

POLL_S = 0.05  # between two looks at /readyz
# The base, dequantised once for all benchmarks; personas are never kept.
CACHE_DIR = Path(tempfile.gettempdir()) / "masquerade-benchmarks" / "cache"

_STOP_S = 30.0  # beyond the server's own grace for replies and for its worker
_OURS = ("HOST", "PORT", "DATA_DIR", "CACHE_DIR", "CONFIG", "API_KEY", "URL", "BASE_URL")  # the others pass through

Line = tuple[float, str]  # when it was read (`time.perf_counter`), and what it said


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. Moments are `time.perf_counter` seconds."""

    url: str
    pid: int
    data_dir: Path
    started: float  # just before its process was
    ready: float  # when /readyz was seen to answer 200
    lines: Sequence[Line]  # its output so far

    @property
    def ready_s(self) -> float:
        """Seconds from process start to /readyz."""
        return self.ready - self.started


def masquerade_command() -> str:
    """The `masquerade` of this virtual environment."""
    found = shutil.which("masquerade", path=str(Path(sys.executable).parent))
    if found is None:
        sys.exit("the masquerade command is not installed beside this Python; `make test` sets everything up")
    return found


@contextmanager
def serving(
    data_dir: Path,
    *,
    cache_dir: Path | None = None,
    command: Sequence[str] = (),
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
    port: int | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Server]:
    """Run a server on a loopback port, a free one by default, from here to the end of the block.

    `command` defaults to this environment's `masquerade serve`, `environ` to this process's; without a `cache_dir` the
    base is cached in the data directory. Exits with the server's last lines where it does not get ready.
    """
    port = port or _free_port()
    command = list(command) or [masquerade_command(), "serve"]
    variables = _variables(os.environ if environ is None else environ, port, data_dir, cache_dir)
    lines: list[Line] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no orphans under `timeout`
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, lines), name="server-output", daemon=True)
    reader.start()
    try:
        url = f"http://127.0.0.1:{port}"
        ready = _ready(url, process, lines, started + timeout_s)
        yield Server(url, process.pid, data_dir, started, ready, lines)
    finally:
        _stop(process)
        reader.join(5.0)


def _variables(environ: Mapping[str, str], port: int, data_dir: Path, cache_dir: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in {f"MASQUERADE_{one}" for one in _OURS}}
    ours = {"MASQUERADE_PORT": str(port), "MASQUERADE_DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1"}
    return kept | ours | ({} if cache_dir is None else {"MASQUERADE_CACHE_DIR": str(cache_dir)})


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def _read(output: IO[str], lines: list[Line]) -> None:
    for line in output:
        lines.append((time.perf_counter(), line.rstrip("\n")))


def _ready(url: str, process: subprocess.Popen[str], lines: Sequence[Line], deadline: float) -> float:
    with Masquerade(url, timeout=5.0, max_retries=0) as client:
        while process.poll() is None and time.perf_counter() < deadline:
            with suppress(APIConnectionError, ServerError):
                client.server.ready()
                return time.perf_counter()
            time.sleep(POLL_S)
    why = "is not ready in time" if process.poll() is None else f"ended with status {process.returncode}"
    sys.exit("\n".join([f"the server {why}; its last lines:", *(line for _, line in lines[-20:])]))


def _stop(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C would: the whole group, `make` and the sculpt worker included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
