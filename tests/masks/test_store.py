from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from masquerade_masks import (
    Attached,
    AttachedNotFound,
    BaseMismatch,
    MaskFile,
    MaskFormatError,
    PersonaFiles,
    SettingError,
    StorageFull,
    VersionNotFound,
    check_persona_id,
)
from masquerade_masks.mask_file import encode


@pytest.fixture
def files(tmp_path: Path) -> PersonaFiles:
    return PersonaFiles(tmp_path / "data")


def listing(files: PersonaFiles) -> list[str]:
    root = files.directory("inn", 1).parents[1]
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_version_is_read_back(files: PersonaFiles, tmp_path: Path, make_mask_file: Callable[..., MaskFile]) -> None:
    content = make_mask_file(2)
    examples = tmp_path / "made.jsonl"
    examples.write_text('{"question": "?"}\n')
    directory = files.publish_version("inn", 2, content, report={"kl": 0.4}, examples=examples)
    assert directory == tmp_path / "data" / "personas" / "inn" / "v2"
    assert listing(files) == ["inn/v2/examples.jsonl", "inn/v2/mask.safetensors", "inn/v2/report.json"]
    assert files.read_mask("inn", 2, base=content.subnetwork.base) == content
    assert files.read_report("inn", 2) == {"kl": 0.4}
    assert files.examples_path("inn", 2).read_text() == '{"question": "?"}\n'


def test_report_and_examples_may_be_missing(files: PersonaFiles, make_mask_file: Callable[..., MaskFile]) -> None:
    files.publish_version("inn", 1, make_mask_file())
    assert files.read_report("inn", 1) is None
    with pytest.raises(VersionNotFound):
        files.examples_path("inn", 1)


def test_a_version_that_is_not_there(files: PersonaFiles) -> None:
    for read in (files.read_mask, files.read_report, files.mask_path, files.examples_path):
        with pytest.raises(VersionNotFound):
            read("inn", 3)
    with pytest.raises(VersionNotFound):
        files.directory("inn", 0)


def test_a_damaged_or_foreign_mask_is_refused(files: PersonaFiles, make_mask_file: Callable[..., MaskFile]) -> None:
    files.publish_version("inn", 1, make_mask_file())
    with pytest.raises(BaseMismatch):
        files.read_mask("inn", 1, base="00" * 32)
    path = files.mask_path("inn", 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaskFormatError, match="truncated"):
        files.read_mask("inn", 1)


@pytest.mark.parametrize(
    "persona_id",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        "A",
        "-a",
        "a" * 64,
        "a\n",
        "a\0",
        "é",
        "a b",
        "a.b",
        "a_b",
    ],
)
def test_no_other_id_reaches_the_file_system(files: PersonaFiles, persona_id: str) -> None:
    for call in (
        lambda: files.directory(persona_id, 1),
        lambda: files.read_mask(persona_id, 1),
        lambda: files.remove(persona_id),
    ):
        with pytest.raises(SettingError) as refused:
            call()
        assert refused.value.field == "id"


def test_good_ids_pass() -> None:
    for persona_id in ("a", "0", "inn-keeper-2", "a" * 63):
        assert check_persona_id(persona_id) == persona_id


def test_remove_takes_everything_of_one_persona(files: PersonaFiles, make_mask_file: Callable[..., MaskFile]) -> None:
    for persona_id in ("inn", "inn-2"):
        files.publish_version(persona_id, 1, make_mask_file())
    files.remove("inn")
    files.remove("inn")
    assert listing(files) == ["inn-2/v1/mask.safetensors"]


def test_what_a_dead_worker_left_is_replaced(files: PersonaFiles, make_mask_file: Callable[..., MaskFile]) -> None:
    files.publish_version("inn", 1, make_mask_file(), report={"kl": 1}, examples=b"old")
    files.publish_version("inn", 1, make_mask_file(seed=1), report={"kl": 2})
    assert files.read_mask("inn", 1) == make_mask_file(seed=1)
    assert listing(files) == ["inn/v1/mask.safetensors", "inn/v1/report.json"]


def test_the_same_digest_is_not_written_again(files: PersonaFiles, make_mask_file: Callable[..., MaskFile]) -> None:
    files.publish_version("inn", 1, make_mask_file(), report={"kl": 1})
    written = files.mask_path("inn", 1).stat()
    files.publish_version("inn", 1, make_mask_file(), report={"kl": 2})
    assert files.mask_path("inn", 1).stat().st_ino == written.st_ino
    assert files.read_report("inn", 1) == {"kl": 1}


def test_a_full_disk_publishes_nothing_and_loses_nothing(
    files: PersonaFiles, make_mask_file: Callable[..., MaskFile], full_disk: Callable[[], None]
) -> None:
    files.publish_version("inn", 1, make_mask_file(), report={})
    before = listing(files)
    full_disk()
    with pytest.raises(StorageFull) as refused:
        files.publish_version("inn", 2, make_mask_file(2, seed=1), report={}, examples=b"x")
    assert refused.value.needed_bytes is not None
    assert listing(files) == before
    assert files.read_mask("inn", 1) == make_mask_file()
    with pytest.raises(VersionNotFound):
        files.read_mask("inn", 2)


def test_a_reader_sees_a_version_whole_or_not_at_all(
    files: PersonaFiles, make_mask_file: Callable[..., MaskFile]
) -> None:
    done = threading.Event()
    seen: list[int] = []
    failures: list[BaseException] = []

    def look() -> None:
        number = 1
        while not (done.is_set() and number > 12):
            try:
                mask = files.read_mask("inn", number)
            except VersionNotFound:
                continue
            except BaseException as error:
                failures.append(error)
                return
            if files.read_report("inn", number) != {"number": mask.header.version}:
                failures.append(AssertionError(number))
            seen.append(number)
            number += 1

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 13):
        files.publish_version("inn", number, make_mask_file(number, seed=number), report={"number": number})
    done.set()
    reader.join(timeout=30)
    assert failures == []
    assert seen == list(range(1, 13))


def test_what_was_acknowledged_survives_kill_9(
    files: PersonaFiles, tmp_path: Path, run_python: Callable[..., subprocess.Popen[str]]
) -> None:
    code = """
import itertools, sys
from pathlib import Path
from masquerade_masks import *
mask = Mask.from_kept_indices([list(range(500))], 1000)
subnetwork = SubNetwork("ab" * 32, FFNShape(1, 1000, 8), mask)
files = PersonaFiles(Path(sys.argv[1]))
for number in itertools.count(1):
    header = MaskHeader("inn", number, "none", "")
    files.publish_version("inn", number, MaskFile(subnetwork, header), report={"number": number})
    print(number, flush=True)
"""
    child = run_python(code, tmp_path / "data")
    assert child.stdout is not None
    for _ in range(20):
        acknowledged = int(child.stdout.readline())
    child.kill()
    rest = child.communicate(timeout=30)[0].split()
    acknowledged = max([acknowledged, *map(int, rest)])
    assert acknowledged >= 20
    for number in range(1, acknowledged + 1):
        assert files.read_mask("inn", number).header.version == number
        assert files.read_report("inn", number) == {"number": number}


# Attached weights


@pytest.fixture
def attach(make_mask_file: Callable[..., MaskFile], make_attached: Callable[..., Attached]) -> Callable[..., MaskFile]:
    """`attach(kind, version=1, seed=0)`: a mask file with weights attached."""

    def make(kind: str, version: int = 1, seed: int = 0) -> MaskFile:
        content = make_mask_file(version, seed=seed)
        subnetwork = content.subnetwork
        weights = make_attached(kind, subnetwork.shape, subnetwork.mask.kept, seed=seed)
        return replace(content, subnetwork=replace(subnetwork, weights=weights))

    return make


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_attached_weights_come_and_go_with_their_version(
    kind: str, files: PersonaFiles, attach: Callable[..., MaskFile]
) -> None:
    content = attach(kind)
    weights = content.subnetwork.weights
    assert weights is not None
    files.publish_version("inn", 1, content)
    name = f"attached-{weights.digest}.safetensors"
    assert listing(files) == [f"inn/v1/{name}", "inn/v1/mask.safetensors"]
    found = files.read_mask("inn", 1)
    assert found == content
    assert found.subnetwork.weights == weights
    assert files.attached_path("inn", 1, weights.digest).name == name
    assert files.find_attached(kind, weights.digest) == weights
    files.remove("inn")
    assert listing(files) == []


def test_attached_weights_of_one_version_may_serve_another(
    files: PersonaFiles, attach: Callable[..., MaskFile]
) -> None:
    files.publish_version("inn", 1, attach("lora"))
    bare = replace(attach("lora").subnetwork, weights=None)
    found = files.find_attached(*bare.attached[0])
    files.publish_version("mill", 1, replace(attach("lora"), subnetwork=replace(bare, weights=found)))
    files.remove("inn")
    assert files.read_mask("mill", 1).subnetwork.weights == found


def test_a_mask_is_never_there_without_its_attached_weights(
    files: PersonaFiles, attach: Callable[..., MaskFile]
) -> None:
    content = attach("lora")
    bare = replace(content, subnetwork=replace(content.subnetwork, weights=None))
    with pytest.raises(AttachedNotFound, match="needs lora weights of digest"):
        files.publish_version("inn", 1, bare)
    assert listing(files) == []
    directory = files.publish_version("inn", 1, content)
    next(directory.glob("attached-*")).unlink()
    with pytest.raises(AttachedNotFound):
        files.read_mask("inn", 1)
    files.publish_version("inn", 1, content)  # what is damaged is written again
    assert files.read_mask("inn", 1) == content


@pytest.mark.parametrize("digest", ["12" * 32, "../../x", "*"])
def test_unknown_attached_weights_are_refused(
    digest: str, files: PersonaFiles, attach: Callable[..., MaskFile]
) -> None:
    files.publish_version("inn", 1, attach("lora"))
    with pytest.raises(AttachedNotFound):
        files.find_attached("lora", digest)


@pytest.mark.parametrize("attached", [(("ia3", "12" * 32),), (("lora", "12" * 32), ("full", "12" * 32))])
def test_a_mask_that_names_other_weights_is_refused(
    attached: tuple[tuple[str, str], ...], files: PersonaFiles, make_mask_file: Callable[..., MaskFile]
) -> None:
    content = make_mask_file()
    path = files.publish_version("inn", 1, content) / "mask.safetensors"
    path.write_bytes(encode(replace(content, subnetwork=replace(content.subnetwork, attached=attached))))
    with pytest.raises(MaskFormatError, match="lora or full weights attached, one of them"):
        files.read_mask("inn", 1)


def test_a_full_disk_leaves_no_attached_weights(
    files: PersonaFiles, attach: Callable[..., MaskFile], full_disk: Callable[[], None]
) -> None:
    files.publish_version("inn", 1, attach("full"))
    before = listing(files)
    full_disk()
    with pytest.raises(StorageFull) as refused:
        files.publish_version("inn", 2, attach("full", 2, seed=1))
    weights = attach("full").subnetwork.weights
    assert weights is not None
    assert refused.value.needed_bytes is not None
    assert refused.value.needed_bytes > weights.num_bytes
    assert listing(files) == before


def test_what_processes_left_behind_is_tidied_away_after_an_hour(
    files: PersonaFiles, attach: Callable[..., MaskFile]
) -> None:
    kept = files.publish_version("inn", 1, attach("lora"))
    root = kept.parents[1]
    left = [root / ".removed-ab", kept.parent / ".v2-ab", kept.parent / ".stale-ab"]
    for directory in left:
        directory.mkdir()
        (directory / "attached-x.safetensors").touch()
    files.tidy()
    assert all(directory.is_dir() for directory in left)
    for directory in left:
        os.utime(directory, (0, 0))
    files.tidy()
    assert not any(directory.exists() for directory in left)
    assert files.read_mask("inn", 1) == attach("lora")
