"""Names of models, and what a catalogue remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running_server import mask_file

from masquerade_engine.base import Base
from masquerade_engine.prompt import persona_system_prompt
from masquerade_masks import PersonaNotFound, SettingError
from masquerade_masks.registry import SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server import catalogue as catalogue_module
from masquerade_server.catalogue import Catalogue, ModelName, parse_model
from masquerade_server.errors import ModelNotFound
from masquerade_server.publishing import Publication, register


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("pip", ModelName("pip")),
        ("pip@3", ModelName("pip", 3)),
        ("pip@dense", ModelName("pip", "dense")),
        ("Qwen/Qwen3-0.6B", ModelName("Qwen/Qwen3-0.6B")),
    ],
)
def test_names(asked: str, name: ModelName) -> None:
    assert parse_model(asked) == name


@pytest.mark.parametrize("asked", ["pip@", "pip@0", "pip@x", "pip@-1", "pip@1.5", "pip@²", "a@b@1", "pip@99999999999"])
def test_names_that_are_none(asked: str) -> None:
    with pytest.raises(ModelNotFound):
        parse_model(asked)


@pytest.fixture
def world(tmp_path: Path, tiny_base: Base) -> Any:
    with SQLiteRegistry(tmp_path / "registry.sqlite") as registry:
        files = PersonaFiles(tmp_path)
        for seed in (1, 2):
            content = mask_file(tiny_base, "Pip", "Pip.", seed)
            prompt = persona_system_prompt("Pip", "Pip.")
            publication = Publication("pip", "Pip.", prompt, content, "sculpt")
            register(registry, files, publication, name="Pip", base=tiny_base.fingerprint)
        yield registry, files, Catalogue(tiny_base, registry, files)


def test_a_version_is_read_from_the_disk_once(world: Any) -> None:
    _, files, catalogue = world
    first = catalogue.resolve("pip").function
    files.remove("pip")
    assert catalogue.resolve("pip").function is first
    assert catalogue.resolve("pip@1").version is None  # never loaded, and now gone


def test_damage_is_looked_at_again_after_a_while(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files, catalogue = world
    path = files.mask_path("pip", 2)
    whole = path.read_bytes()
    path.unlink()
    assert catalogue.resolve("pip").version is None
    path.write_bytes(whole)
    assert catalogue.resolve("pip").version is None
    monkeypatch.setattr(catalogue_module, "_DAMAGE_RECHECK_S", 0.0)
    assert catalogue.resolve("pip").version == 2


def test_the_oldest_functions_are_forgotten(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_FUNCTIONS", 1)
    _, _, catalogue = world
    first = catalogue.resolve("pip@1").function
    assert catalogue.resolve("pip@1").function is first
    catalogue.resolve("pip@2")
    assert catalogue.resolve("pip@1").function is not first


def test_requests_are_counted_for_the_busiest(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "MAX_COUNTED", 4)
    registry, _, catalogue = world
    for number in range(6):
        registry.create_persona(replace(registry.get_persona("pip"), id=f"p-{number}", version=None))
    for model in ("pip", "pip@1", "pip@dense", "pip", *(f"p-{number}" for number in range(6))):
        catalogue.resolve(model)
        catalogue.target(model)  # looks, and is no request
    assert catalogue.num_requests("pip") == 4
    assert len(catalogue._num_requests) <= 4


def test_fields_that_contradict_each_other(world: Any) -> None:
    _, _, catalogue = world
    for model, persona in (("pip", "tom"), ("pip@1", "pip@2"), ("pip@dense", "pip@1")):
        with pytest.raises(SettingError, match="send one"):
            catalogue.resolve(model, persona)
    with pytest.raises(SettingError, match="is required"):
        catalogue.resolve(None, None)


def test_the_base_has_no_prompt_and_dense_has_the_personas(world: Any) -> None:
    _, _, catalogue = world
    base = catalogue.resolve(catalogue._base.name)
    dense = catalogue.resolve("pip@dense")
    assert (base.system_prompt, base.persona_id) == (None, None)
    assert dense.system_prompt == persona_system_prompt("Pip", "Pip.")
    assert base.function == dense.function
    assert base.fingerprint == dense.fingerprint == f"base-{catalogue._base.fingerprint[:16]}"


def test_a_deleted_persona_is_gone_at_once(world: Any) -> None:
    registry, _, catalogue = world
    catalogue.resolve("pip")
    registry.delete_persona("pip")
    with pytest.raises(ModelNotFound) as caught:
        catalogue.resolve("pip")
    assert isinstance(caught.value.__cause__, PersonaNotFound)
