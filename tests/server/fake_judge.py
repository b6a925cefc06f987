"""A judge on a loopback port: an OpenAI-compatible endpoint whose every answer a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# From a prompt and the number of calls before it: a status, and the reply's text or a whole body.
Script = Callable[[str, int], tuple[int, Any]]


@dataclass
class FakeJudge:
    """Where it listens, and what it was sent."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def judge_server(script: Script) -> Iterator[FakeJudge]:
    """Serve `POST /v1/chat/completions` until the end of the block."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(judge.bodies)
                judge.bodies.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                running += 1
                judge.most_at_once = max(judge.most_at_once, running)
            if self.path != "/v1/chat/completions":
                status, said = 404, {"error": {"message": f"no {self.path}"}}
            else:
                status, said = script(body["messages"][0]["content"], number)
            with lock:
                running -= 1
            reply = {"choices": [{"message": {"role": "assistant", "content": said}}]}
            content = json.dumps(reply if isinstance(said, str) else said).encode()
            self.send_response(status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge = FakeJudge(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield judge
        finally:
            server.shutdown()
            thread.join()
