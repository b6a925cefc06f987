"""Everything a client can get wrong: each is a sentence that names the field or the limit, in OpenAI's shape."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from running_server import RunningServer, settings_for, subnetwork_of

from masquerade_masks import FFNShape, mask_file
from masquerade_masks.mask_file import MaskFile, MaskHeader

CHAT = {"model": "mira", "messages": [{"role": "user", "content": "hi"}]}
PERSONA = {"name": "New", "text": "New is new."}


def check(response: httpx.Response, status: int, param: str | None, *says: str) -> dict[str, Any]:
    """The error of a response, which must be in the one shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for word in says:
        assert word in error["message"], error["message"]
    assert "x-request-id" in response.headers
    return error


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"text": ""}, "text", "must not be empty"),
        ({"text": " \n\t "}, "text", "must not be empty"),
        ({"text": "x" * 1_000_000}, "text", "1000000 bytes long; the limit is 16384"),
        ({"text": "é" * 9000}, "text", "18000 bytes"),
        ({"text": "a\x00b"}, "text", "control characters"),
        ({"text": None}, "text", "string"),
        ({"text": 5}, "text", "string"),
        ({"text": "x " * 500}, "text", "tokens"),
        ({"name": ""}, "name", "must not be empty"),
        ({"name": "a\nb"}, "name", "one line"),
        ({"name": "x" * 101}, "name", "100"),
        ({"sparsity": 0}, "sparsity", "greater than 0, got 0"),
        ({"sparsity": 1}, "sparsity", "less than or equal to 0.9, got 1"),
        ({"sparsity": -0.5}, "sparsity", "greater than 0"),
        ({"sparsity": "a"}, "sparsity", "valid number, got 'a'"),
        ({"sparsity": "0.25"}, "sparsity", "valid number"),
        ({"sparsity": True}, "sparsity", "valid number"),
        ({"sparsity": math.nan}, "sparsity", "finite"),
        ({"sparsity": math.inf}, "sparsity", "finite"),
        ({"recovery": "magic"}, "recovery", "'none', 'vectors', 'lora' or 'full'"),
        ({"teacher": "https://example.org"}, "teacher", "'base' or 'remote'"),
        ({"teacher": {"url": "https://example.org"}}, "teacher", "'base' or 'remote'"),
        ({"teacher": "remote"}, "teacher", "not configured on this server"),
        ({"teacher": "remote", "dry_run": True}, "teacher", "not configured on this server"),
        ({"teacher": "remote", "sculpt": False}, "teacher", "not configured on this server"),
        ({"teacher_url": "https://example.org"}, "teacher_url", "unknown field"),
        ({"preset": "best"}, "preset", "'smoke', 'default' or 'thorough'"),
        ({"cast": "../x"}, "cast", "pattern"),
        ({"id": "../../etc"}, "id", "pattern"),
        ({"id": "UPPER"}, "id", "pattern"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"sculpt": "no"}, "sculpt", "boolean"),
        ({"sparcity": 0.5}, "sparcity", "did you mean 'sparsity'"),
        ({"zzz": 1, "yyy": 2}, "zzz", "yyy: unknown field"),
        ({"card": {}}, "card", "unknown field"),
    ],
)
def test_personas(town: RunningServer, fields: dict[str, Any], param: str, says: str) -> None:
    body = json.dumps(PERSONA | fields)  # httpx refuses NaN, which a client may well send
    headers = {"content-type": "application/json"}
    check(town.client.post("/personas", content=body, headers=headers), 400, param, says)
    assert "new" not in [one["id"] for one in town.client.get("/personas").json()["data"]]


def test_what_is_missing_is_named(town: RunningServer) -> None:
    check(town.client.post("/personas", json={}), 400, "name", "name: is required", "text: is required")


def test_an_id_that_is_taken_and_one_that_is_the_bases(town: RunningServer) -> None:
    taken = town.client.post("/personas", json=PERSONA | {"id": "mira"})
    assert check(taken, 409, "id", "mira")["code"] == "persona_exists"
    assert taken.headers["x-should-retry"] == "false"
    base = PERSONA | {"id": town.base.name}
    check(town.client.post("/personas", json=base), 400, "id", "the name of the base")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": None}, "model", "is required"),
        ({"model": ""}, "model", "is required"),
        ({"model": 5}, "model", "string"),
        ({"persona": "plain"}, "persona", "send one"),
        ({"persona": "mira@1", "model": "mira@2"}, "persona", "send one"),
        ({"persona": ""}, "persona", "empty"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "'image_url'; this server reads text only",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0]",
            "tool calls",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**12}, "max_tokens", "512 tokens that the context holds"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens", "left"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "send one"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens", "at most 3"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": math.nan}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"stop": [""]}, "stop", "1 to 1000 characters"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": 3, "best_of": 4}, "best_of", "must be n (3)"),
        ({"best_of": 2}, "best_of", "must be n (1)"),
        ({"deadline_s": 0}, "deadline_s", "greater than 0"),
        ({"deadline_s": 3601}, "deadline_s", "less than or equal to 3600"),
        ({"deadline_s": math.nan}, "deadline_s", "finite"),
        ({"truncation": "middle"}, "truncation", "'disabled' or 'auto'"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "must be empty"),
        ({"tools": [{"type": "function"}]}, "tools", "no tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"functions": [{}]}, "functions", "no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{'type': 'text'}"),
        ({"guided_json": {"type": "object"}}, "guided_json", "constrained"),
        ({"modalities": ["text", "audio"]}, "modalities", "['text']"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"priority": 2}, "priority", "less than or equal to 1"),
        ({"temprature": 0.5}, "temprature", "did you mean 'temperature'"),
        ({"max_token": 5}, "max_token", "did you mean 'max_tokens'"),
    ],
)
def test_chat(town: RunningServer, fields: dict[str, Any], param: str, says: str) -> None:
    for stream in (False, True):
        body = json.dumps(CHAT | fields | {"stream": stream})
        headers = {"content-type": "application/json"}
        check(town.client.post("/v1/chat/completions", content=body, headers=headers), 400, param, says)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [1, "a"]}, "prompt", "one text"),
        ({"prompt": [1.5]}, "prompt", "a list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt", "not 2"),
        ({"prompt": [1, 10**9]}, "prompt", "1000000000"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": None}, "prompt", ""),
        ({"echo": True}, "echo", "not repeated"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "must be n (1)"),
        ({"truncation": "auto"}, "truncation", "is for chats"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "here it is max_tokens"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ],
)
def test_completions(town: RunningServer, fields: dict[str, Any], param: str, says: str) -> None:
    body = {"model": "mira", "prompt": "abc"} | fields
    check(town.client.post("/v1/completions", json=body), 400, param, says)


@pytest.mark.parametrize("model", ["nobody", "mira@9", "mira@x", "mira@", "mira@0", "mira@-1", "@dense", "../x"])
def test_unknown_models(town: RunningServer, model: str) -> None:
    error = check(town.chat(model), 404, "model")
    assert error["code"] == "model_not_found"


def test_a_deleted_persona_is_unknown(town: RunningServer) -> None:
    town.client.post("/personas", json=PERSONA | {"id": "ghost", "sculpt": False})
    assert town.client.delete("/personas/ghost").json() == {"id": "ghost", "deleted": True}
    check(town.chat("ghost"), 404, "model", "ghost")
    for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/mask")):
        response = town.client.request(method, f"/personas/ghost{path}", json={"seed": 1})
        assert check(response, 404, None, "ghost")["code"] == "persona_not_found"


def test_a_prompt_longer_than_the_context(town: RunningServer) -> None:
    for stream in (False, True):
        error = check(town.chat("mira", "x" * 2000, stream=stream), 400, "messages", "512")
        assert error["code"] == "context_length_exceeded"


# --- bodies

POSTS = ("/v1/chat/completions", "/v1/completions", "/personas", "/personas/mira/rollback")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"model": ', "not valid JSON"),
        (b"{'a': 1}", "line 1, column 2"),
        (b"[1]", "must be a JSON object"),
        (b'"hi"', "must be a JSON object"),
        (b'{"name": "\xff"}', "not UTF-8: byte 10"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_malformed_bodies(town: RunningServer, path: str, content: bytes, says: str) -> None:
    response = town.client.post(path, content=content, headers={"content-type": "application/json"})
    assert check(response, 400, None, says)["code"] == "malformed_body"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "image/png; x=y", None])
def test_wrong_content_types(town: RunningServer, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    check(town.client.post(path, content=b"{}", headers=headers), 415, None, "Content-Type", "application/json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"])
def test_right_content_types(town: RunningServer, kind: str) -> None:
    response = town.client.post("/personas", content=b"{}", headers={"content-type": kind})
    check(response, 400, "name", "is required")


def test_bodies_over_the_limit(town: RunningServer) -> None:
    headers = {"content-type": "application/json"}
    big = b'{"model": "' + b"x" * 3_000_000 + b'"}'
    check(town.client.post("/v1/chat/completions", content=big, headers=headers), 413, None, "2097152")

    def pieces() -> Any:
        yield from (big[start : start + 65536] for start in range(0, len(big), 65536))

    check(town.client.post("/v1/chat/completions", content=pieces(), headers=headers), 413, None, "2097152")


def test_no_body_at_all(town: RunningServer) -> None:
    assert town.client.post("/v1/chat/completions").status_code == 415


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "ids", "is required"),
        ({"ids": []}, "ids", "at least 1"),
        ({"ids": ["mira"] * 257}, "ids", "at most 256"),
        ({"ids": "mira"}, "ids", "list"),
        ({"ids": [3]}, "ids[0]", "string"),
        ({"ids": ["mira", ""]}, "ids[1]", "at least 1 character"),
        ({"ids": ["mira"], "pin": "yes"}, "pin", "boolean"),
        ({"ids": ["mira"], "pinned": True}, "pinned", "did you mean 'pin'"),
    ],
)
def test_warming(town: RunningServer, body: dict[str, Any], param: str, says: str) -> None:
    check(town.client.post("/personas/warm", json=body), 400, param, says)


@pytest.mark.parametrize("unknown", ["nobody", "mira@9", "mira@x", "../x"])
def test_warming_what_is_not_there(town: RunningServer, unknown: str) -> None:
    error = check(town.client.post("/personas/warm", json={"ids": ["mira", unknown]}), 404, "ids[1]")
    assert error["code"] == "model_not_found"


# --- routes and parameters


def test_unknown_routes_and_methods(town: RunningServer) -> None:
    assert check(town.client.get("/v1/embeddings"), 404, None, "/v1/embeddings")["code"] == "route_not_found"
    assert check(town.client.get("/personas/"), 404, None)["code"] == "route_not_found"
    response = town.client.put("/v1/chat/completions", json={})
    check(response, 405, None, "does not take PUT", "POST")
    assert response.headers["allow"] == "POST"
    assert town.client.put("/personas", json={}).headers["allow"] == "GET, POST"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/personas?limit=0", "limit"),
        ("/personas?limit=many", "limit"),
        ("/personas?cast=NO", "cast"),
        ("/personas/mira/mask?version=0", "version"),
        ("/casts/default/overlap?n=1", "n"),
        ("/casts/UPPER/overlap", "cast"),
    ],
)
def test_wrong_parameters(town: RunningServer, path: str, param: str) -> None:
    check(town.client.get(path), 400, param)


@pytest.mark.parametrize("persona_id", ["..%2f..%2fetc", "%00", "a%20b", "ABC", "x" * 100, "%F0%9F%90%89"])
def test_no_path_of_a_client_reaches_the_files(town: RunningServer, persona_id: str) -> None:
    for path in ("", "/mask", "/report", "/examples", "/events"):
        response = town.client.get(f"/personas/{persona_id}{path}")
        assert response.status_code == 404, response.text
        assert set(response.json()) == {"error"}


def test_an_event_id_that_is_none(town: RunningServer) -> None:
    response = town.client.get("/personas/mira/events", headers={"last-event-id": "yesterday"})
    check(response, 400, "Last-Event-ID", "'yesterday'")


# --- masks


def mask_bytes(town: RunningServer, **changes: Any) -> bytes:
    base = changes.pop("base", town.base.fingerprint)
    shape = changes.pop("shape", town.base.shape)
    header = MaskHeader("any", 1, "none", "0" * 64, {}, "2026-01-01T00:00:00Z")
    return mask_file.encode(MaskFile(subnetwork_of(base, shape, 5), header))


def test_masks_that_are_refused(town: RunningServer) -> None:
    good = mask_bytes(town)
    flipped = bytearray(good)
    flipped[-1] ^= 1
    cases = [
        (mask_bytes(town, base="f" * 64), "base_mismatch", "another base"),
        (mask_bytes(town, shape=FFNShape(2, 96, 32)), "invalid_mask", "layers"),
        (good[:-10], "invalid_mask", ""),
        (bytes(flipped), "invalid_mask", ""),
        (b"not safetensors at all", "invalid_mask", ""),
    ]
    for content, code, says in cases:
        response = town.client.put("/personas/plain/mask", content=content)
        assert check(response, 400, "mask", says)["code"] == code
    check(town.client.put("/personas/plain/mask"), 400, "mask", "empty")
    too_big = town.client.put("/personas/plain/mask", content=b"x" * (33 * 1024 * 1024))
    assert check(too_big, 413, None, "33554432")
    assert town.client.get("/personas/plain").json()["version"] is None


def test_what_is_not_there_yet(town: RunningServer) -> None:
    for path in ("mask", "report", "examples"):
        response = town.client.get(f"/personas/plain/{path}")
        assert check(response, 404, None, "no mask yet")["code"] == "no_mask_yet"
    assert check(town.client.get("/personas/mira/mask?version=9"), 404, "version")["code"] == "version_not_found"
    rollback = town.client.post("/personas/mira/rollback", json={"version": 9})
    assert check(rollback, 404, "version")["code"] == "version_not_found"
    check(town.client.post("/personas/mira/cancel"), 409, None, "not being sculpted")


# --- keys


def test_an_api_key(start_server: Any, tmp_path: Any, tiny_base_dir: Any) -> None:
    settings = settings_for(tmp_path, tiny_base_dir, api_key="hunter2")
    running: RunningServer = start_server(settings)
    for headers in ({}, {"authorization": "Bearer abc123"}, {"authorization": "hunter2"}):
        response = running.client.get("/v1/models", headers=headers)
        assert check(response, 401, None, "Authorization: Bearer")["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} hunter2"}
        assert running.client.get("/v1/models", headers=headers).status_code == 200
    assert running.client.get("/healthz").status_code == 200
    assert running.client.get("/readyz").status_code == 200
    check(running.client.get("/personas/mira"), 401, None)


def test_without_a_key_any_bearer_is_welcome(town: RunningServer) -> None:
    headers = {"authorization": "Bearer abc123"}  # what Mantella sends to local servers
    assert town.client.get("/v1/models", headers=headers).status_code == 200
