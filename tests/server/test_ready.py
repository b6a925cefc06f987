"""Bringing in the personas that ship with their masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from running_server import mask_file, subnetwork_of

from masquerade_engine.base import Base
from masquerade_masks.mask_file import MaskFile, encode
from masquerade_masks.registry import Persona, SQLiteRegistry
from masquerade_masks.store import PersonaFiles
from masquerade_server.ready import import_ready, pruner_data, shipped

PIP = {"id": "pip", "name": "Pip", "text": "Pip talks fast."}
MARTA = {"id": "marta", "name": "Marta", "text": "Marta brews."}


class Shipment:
    """A data folder as the pruner ships it, and an empty registry."""

    def __init__(self, root: Path, base: Base, registry: SQLiteRegistry) -> None:
        self.data = root / "shipped"
        self.data_dir = root / "data"
        self.base = base
        self.registry = registry
        self.files = PersonaFiles(self.data_dir)
        (self.data / "ready").mkdir(parents=True)
        (self.data / "ready.json").write_text(json.dumps([PIP, MARTA]))

    def pack(self, persona: dict[str, str], content: bytes | None = None) -> None:
        found = content or encode(mask_file(self.base, persona["name"], persona["text"], 1))
        (self.data / "ready" / f"{persona['id']}.safetensors").write_bytes(found)
        (self.data / "ready" / f"{persona['id']}.report.json").write_text('{"kept": 48}')

    def bring_in(self) -> list[str]:
        return import_ready(self.base, self.registry, self.files, self.data_dir, self.data)


@pytest.fixture
def shipment(tmp_path: Path, tiny_base: Base) -> Iterator[Shipment]:
    with SQLiteRegistry(tmp_path / "data" / "registry.sqlite") as registry:
        yield Shipment(tmp_path, tiny_base, registry)


def test_ready_personas_are_served_from_their_masks(shipment: Shipment) -> None:
    shipment.pack(PIP)
    shipment.pack(MARTA)
    assert shipment.bring_in() == ["pip", "marta"]
    persona = shipment.registry.get_persona("pip")
    assert (persona.version, persona.name, persona.preset, persona.sparsity) == (1, "Pip", "smoke", 0.5)
    assert shipment.registry.get_version("pip", 1).source == "ready"
    assert shipment.files.read_mask("pip", 1, base=shipment.base.fingerprint)
    assert shipment.files.read_report("pip", 1) == {"kept": 48}


def test_they_come_once_and_a_deleted_one_stays_deleted(shipment: Shipment) -> None:
    shipment.pack(PIP)
    shipment.pack(MARTA)
    shipment.bring_in()
    shipment.registry.delete_persona("pip")
    assert shipment.bring_in() == []
    assert [one.id for one in shipment.registry.list_personas()] == ["marta"]


def test_a_mask_that_needs_more_than_is_shipped_is_passed_over(shipment: Shipment) -> None:
    content = mask_file(shipment.base, PIP["name"], PIP["text"], 1)
    attached = replace(content.subnetwork, attached=(("lora", "12" * 32),))
    shipment.pack(PIP, encode(replace(content, subnetwork=attached)))
    shipment.pack(MARTA)
    assert shipment.bring_in() == ["marta"]


def test_a_mask_that_is_not_there_yet_comes_later(shipment: Shipment) -> None:
    shipment.pack(PIP)
    assert shipment.bring_in() == ["pip"]
    shipment.pack(MARTA)
    assert shipment.bring_in() == ["marta"]


def test_masks_for_another_base_and_damaged_ones_are_passed_over(shipment: Shipment) -> None:
    header = mask_file(shipment.base, "Pip", PIP["text"], 1).header
    shipment.pack(PIP, encode(MaskFile(subnetwork_of("f" * 64, shipment.base.shape, 1), header)))
    shipment.pack(MARTA, b"damaged")
    assert shipment.bring_in() == []
    assert shipment.registry.list_personas() == []


def test_a_users_own_persona_of_that_id_is_left_alone(shipment: Shipment) -> None:
    shipment.registry.create_persona(Persona("pip", "My Pip", "Mine.", "You are mine."))
    shipment.pack(PIP)
    shipment.bring_in()
    persona = shipment.registry.get_persona("pip")
    assert (persona.text, persona.version) == ("Mine.", None)


def test_an_import_that_was_cut_off_is_finished(shipment: Shipment) -> None:
    shipment.registry.create_persona(Persona("pip", PIP["name"], PIP["text"], "You are Pip."))
    shipment.pack(PIP)
    assert shipment.bring_in() == ["pip"]
    assert shipment.registry.get_persona("pip").version == 1


def test_nothing_shipped_is_no_error(shipment: Shipment, tmp_path: Path) -> None:
    assert shipped(None) == []
    assert shipped(tmp_path / "nowhere") == []
    assert import_ready(shipment.base, shipment.registry, shipment.files, shipment.data_dir, None) == []


def test_the_pruners_data_is_found_and_well_formed() -> None:
    data = pruner_data()
    assert data is not None
    listed = json.loads((data / "ready.json").read_text("utf-8"))
    assert len(listed) >= 3
    assert all({"id", "name", "text"} <= set(entry) for entry in listed)
