from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

import masquerade_masks
from masquerade_masks import MasqueradeError, StorageFull, errors

EVERY = [
    errors.SettingError("sparsity", "must be below 1"),
    errors.BaseNotFound("nowhere", "there is no such directory"),
    errors.UnsupportedModel("no gate"),
    errors.MaskFormatError("not a mask file"),
    errors.MaskShapeError("ragged"),
    errors.MaskIndexError("layer 2 keeps neuron 9 twice", 2),
    errors.EmptyLayer(4),
    errors.NonFiniteMask("gain", 1),
    errors.DigestMismatch("aa", "bb"),
    errors.BaseMismatch("aa", "bb"),
    errors.AttachedNotFound("lora", "12" * 32),
    errors.PersonaNotFound("inn"),
    errors.VersionNotFound("inn", 3),
    errors.PersonaExists("inn"),
    errors.JobNotFound("j1"),
    errors.JobConflict("inn", "j1", "already being sculpted"),
    errors.NoMaskYet("inn"),
    errors.StorageFull("/data/x", 12),
    errors.QueueFull(256, 1.5),
    errors.ContextTooLong(9000, 8192),
    errors.EngineStopped(),
    errors.WeightsNotLoaded(30.0, 5.0),
    errors.WeightsTooLarge(200, 100),
    errors.SculptCancelled(),
    errors.TeacherError("the teacher gave no answer"),
    errors.InsufficientMemory("cuda:0", 21_300_000_000, 15_200_000_000, "take a smaller base"),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_an_error_keeps_its_attributes_and_sentence_through_pickling(error: MasqueradeError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert len(str(error)) > 5


def test_the_list_above_holds_every_leaf() -> None:
    tree = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, MasqueradeError)]
    # Leaves of this module's tree: what another package adds below one of them does not count.
    leaves = {cls for cls in tree if not any(below in tree for below in cls.__subclasses__())}
    assert {type(error) for error in EVERY} == leaves


def test_the_package_exports_every_error() -> None:
    names = {name for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, MasqueradeError)}
    assert names <= set(masquerade_masks.__all__)


def test_every_exported_name_exists() -> None:
    assert [name for name in masquerade_masks.__all__ if not hasattr(masquerade_masks, name)] == []


def test_sentences_name_the_field_and_the_limit() -> None:
    assert str(errors.SettingError("sparsity", "must be below 1")) == "sparsity: must be below 1"
    assert "9000" in str(errors.ContextTooLong(9000, 8192))
    assert "8192" in str(errors.ContextTooLong(9000, 8192))
    assert str(errors.QueueFull(256, 1.5)).endswith("try again in 1.5 s")
    assert StorageFull(Path("a") / "b").path == str(Path("a") / "b")
