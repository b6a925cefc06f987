from __future__ import annotations

import pytest

from masquerade_masks import (
    BaseMismatch,
    EmptyLayer,
    MasqueradeError,
    PersonaExists,
    QueueFull,
    SculptCancelled,
    SettingError,
    StorageFull,
    TeacherError,
)
from masquerade_server.errors import (
    MethodNotAllowed,
    NotReady,
    error_body,
    error_headers,
    error_response,
    field_path,
    invalid_body,
    wire,
)


def leaves(kind: type[MasqueradeError]) -> list[type[MasqueradeError]]:
    below = kind.__subclasses__()
    return [kind] if not below else [leaf for one in below for leaf in leaves(one)]


# Raised while sculpting, in another process: they reach a client as a job's sentence.
_NEVER_ON_THE_WIRE = {SculptCancelled, TeacherError}


def test_every_error_of_the_tree_has_a_status_of_its_own() -> None:
    known = {leaf for leaf in leaves(MasqueradeError) if leaf.__module__ == "masquerade_masks.errors"}
    for leaf in known - _NEVER_ON_THE_WIRE:
        assert wire(leaf.__new__(leaf)).code != "internal_error", leaf


def test_the_shape_is_openais() -> None:
    assert error_body(SettingError("sparsity", "is too high")) == {
        "error": {
            "message": "sparsity: is too high",
            "type": "invalid_request_error",
            "param": "sparsity",
            "code": "invalid_value",
        }
    }


def test_an_error_without_a_line_takes_the_nearest_above_it() -> None:
    assert wire(EmptyLayer(3)).code == "invalid_mask"
    assert wire(BaseMismatch("a", "b")).code == "base_mismatch"


def test_a_full_queue_says_when_to_come_back() -> None:
    response = error_response(QueueFull(4, 2.3))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert "x-should-retry" not in response.headers


def test_sdks_are_kept_from_retrying_in_vain() -> None:
    assert error_headers(PersonaExists("a"))["x-should-retry"] == "false"
    assert error_headers(NotReady("no such model", failed=True)) == {"x-should-retry": "false"}
    assert error_headers(NotReady("loading")) == {"retry-after": "2"}


def test_paths_of_the_server_stay_on_the_server() -> None:
    error = StorageFull("/var/lib/masquerade/x", 10)
    assert "/var" not in error_body(error)["error"]["message"]
    assert wire(error).status == 507


def test_allow_comes_with_405() -> None:
    assert error_headers(MethodNotAllowed("PUT", "/personas", "GET, POST")) == {"allow": "GET, POST"}


def test_field_paths() -> None:
    assert field_path(("messages", 0, "content")) == "messages[0].content"
    assert field_path(()) == ""


@pytest.mark.parametrize(("count", "more"), [(3, False), (9, True)])
def test_many_wrong_fields_are_told_together_and_not_endlessly(count: int, more: bool) -> None:
    errors = [{"type": "extra_forbidden", "loc": (f"x{number}",), "msg": "", "input": 1} for number in range(count)]
    error = invalid_body(errors, ["name"])
    assert error.param == "x0"
    assert ("more" in str(error)) is more
    assert str(error).count("unknown field") == min(count, 5)
