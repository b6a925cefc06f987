"""Settings of the clients, and what an abandoned or failed stream leaves behind."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import masquerade_client
from masquerade_client import AsyncMasquerade, InvalidSetting, Masquerade, Stream
from masquerade_client.client import AsyncPersonaCalls, PersonaCalls


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://town:8000", "http://town:8000"),
        ("http://town:8000/", "http://town:8000"),
        ("http://town:8000/v1", "http://town:8000"),
        ("https://town/masks/v1/", "https://town/masks"),
    ],
)
def test_base_url(given: str, root: str) -> None:
    paths: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        paths.append(str(request.url))
        return httpx.Response(200, json={"data": []})

    with Masquerade(given, transport=httpx.MockTransport(handle)) as client:
        client.models.list()
    assert paths == [f"{root}/v1/models"]


def test_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASQUERADE_URL", raising=False)
    with Masquerade() as client:
        assert client.base_url == "http://127.0.0.1:8000"
    monkeypatch.setenv("MASQUERADE_URL", "http://town:1")
    with Masquerade() as client:
        assert client.base_url == "http://town:1"


def test_the_key_is_sent_as_a_bearer_token(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(lambda _: httpx.Response(200, json={"data": []}))
    monkeypatch.setenv("MASQUERADE_API_KEY", "from-env")
    client.call(lambda c: c.models.list())
    client.options["api_key"] = "given"
    client.call(lambda c: c.models.list())
    monkeypatch.delenv("MASQUERADE_API_KEY")
    client.options.clear()
    client.call(lambda c: c.models.list())
    keys = [request.headers.get("authorization") for request in client.requests]
    assert keys == ["Bearer from-env", "Bearer given", None]


@pytest.mark.parametrize("url", ["town", "ftp://town", "http://", "http://town:port"])
def test_a_url_that_cannot_work(url: str) -> None:
    with pytest.raises(InvalidSetting, match="URL"):
        Masquerade(url)
    with pytest.raises(InvalidSetting, match="URL"):
        AsyncMasquerade(url)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", " padded "])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(InvalidSetting, match="API key"):
        Masquerade(api_key=key)


@pytest.mark.parametrize("persona_id", ["", ".", ".."])
def test_an_id_that_would_be_another_path(client_of: Any, persona_id: str) -> None:
    client = client_of(lambda _: pytest.fail("sent"))
    with pytest.raises(InvalidSetting, match="persona id"):
        client.call(lambda c: c.personas.delete(persona_id))


def test_an_id_is_quoted(client_of: Any) -> None:
    client = client_of(lambda _: httpx.Response(204))
    client.call(lambda c: c.personas.delete("a/../b?c#d"))
    assert client.requests[0].url.raw_path == b"/personas/a%2F..%2Fb%3Fc%23d"


def test_both_clients_have_the_same_calls() -> None:
    def calls(group: type) -> dict[str, Any]:
        return {name: getattr(one, "_operation", None) for name, one in vars(group).items() if not name.startswith("_")}

    assert calls(PersonaCalls) == calls(AsyncPersonaCalls)
    assert None not in calls(PersonaCalls).values()


def test_calls_keep_their_documentation() -> None:
    with Masquerade() as client:
        assert "Raises NotFound" in (client.personas.get.__doc__ or "")


def test_the_surface_is_what_all_says() -> None:
    assert sorted(masquerade_client.__all__) == list(masquerade_client.__all__)
    assert all(hasattr(masquerade_client, name) for name in masquerade_client.__all__)


def test_a_dropped_stream_closes_its_connection(pieces: Any) -> None:
    body = pieces(b'data: {"id": "a", "model": "m", "choices": []}\n\n' * 2)
    with Masquerade(transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=body))) as client:
        stream = client.chat.stream("mira", "Hello?")
        next(stream)
        assert not body.closed
        del stream
        assert body.closed


def test_a_stream_that_failed_or_was_closed_has_no_result() -> None:
    answer = httpx.MockTransport(lambda _: httpx.Response(400, json={"error": {"message": "no"}}))
    with Masquerade(transport=answer) as client:
        failed: Stream[Any, Any] = client.chat.stream("mira", "Hello?")
        with pytest.raises(masquerade_client.BadRequest):
            next(failed)
        assert list(failed) == []
        with pytest.raises(RuntimeError, match="no result"):
            failed.result()
        closed = client.chat.stream("mira", "Hello?")
        closed.close()
        with pytest.raises(RuntimeError, match="no result"):
            closed.result()
