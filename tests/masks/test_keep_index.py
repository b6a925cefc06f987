from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masquerade_masks import (
    EmptyLayer,
    FFNShape,
    MaskFormatError,
    MaskIndexError,
    MaskShapeError,
    StorageFull,
    SubNetwork,
    export_keep_index,
    import_keep_index,
)

SHAPE = FFNShape(2, 11, 4)
BASE = "ab" * 32


def as_json(rows: Any) -> bytes:
    return json.dumps(rows).encode()


def as_pt(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Payload:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_an_export_is_imported_as_the_same_mask(
    suffix: str, tmp_path: Path, make_subnetwork: Callable[..., SubNetwork]
) -> None:
    shape = FFNShape(3, 45, 8)
    subnetwork = make_subnetwork(shape, 17, gain=True)
    path = tmp_path / f"keep{suffix}"
    export_keep_index(subnetwork, path)
    imported = import_keep_index(path, base=subnetwork.base, shape=shape)
    assert imported.mask == subnetwork.mask
    assert imported.gain is None
    assert import_keep_index(path.read_bytes(), suffix, base=subnetwork.base, shape=shape) == imported


def test_an_export_is_an_integer_array_of_layers_by_kept(
    tmp_path: Path, make_subnetwork: Callable[..., SubNetwork]
) -> None:
    subnetwork = make_subnetwork(FFNShape(3, 45, 8), 17)
    export_keep_index(subnetwork, tmp_path / "keep.pt")
    export_keep_index(subnetwork, tmp_path / "keep.json")
    tensor = torch.load(tmp_path / "keep.pt", weights_only=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.int64, (3, 17))
    assert json.loads((tmp_path / "keep.json").read_bytes()) == tensor.tolist()
    assert tensor.tolist() == subnetwork.mask.kept_indices().tolist()


@given(st.lists(st.permutations(range(11)), min_size=2, max_size=2), st.integers(1, 11))
def test_indices_may_stand_in_any_order(rows: list[list[int]], kept: int) -> None:
    rows = [row[:kept] for row in rows]
    imported = import_keep_index(as_json(rows), ".json", base=BASE, shape=SHAPE)
    assert imported.mask.kept_indices().tolist() == [sorted(row) for row in rows]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_tensors_of_any_width_are_read(dtype: torch.dtype) -> None:
    data = as_pt(torch.tensor([[3, 1], [10, 0]], dtype=dtype))
    assert import_keep_index(data, ".pt", base=BASE, shape=SHAPE).mask.kept_indices().tolist() == [
        [1, 3],
        [0, 10],
    ]


def test_a_list_of_one_tensor_a_layer_is_read() -> None:
    data = as_pt([torch.tensor([3, 1]), torch.tensor([10, 0])])
    assert import_keep_index(data, ".pt", base=BASE, shape=SHAPE).mask.kept == 2


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1, 2], [3, 11]], MaskIndexError, "layer 1 keeps neuron 11, not one of 0 to 10"),
        ([[1, -2], [3, 4]], MaskIndexError, "layer 0 keeps neuron -2"),
        ([[1, 2], [3, 3]], MaskIndexError, "layer 1 keeps neuron 3 twice"),
        ([[1, 2], [3, 2**70]], MaskIndexError, "layer 1 keeps a neuron whose index does not fit"),
        ([[1, 2], [3]], MaskShapeError, "ragged: layer 0 keeps 2 neurons, layer 1 1"),
        ([[1, 2]], MaskShapeError, "has 1 layers, and the base 2 layers"),
        ([[1, 2]] * 3, MaskShapeError, "has 3 layers"),
        ([list(range(12))] * 2, MaskShapeError, "keeps 12 neurons a layer"),
        ([[], []], EmptyLayer, "layer 0"),
        ([], MaskFormatError, "list of one list"),
        ({"0": [1, 2]}, MaskFormatError, "list of one list"),
        ([1, 2], MaskFormatError, "list of one list"),
        ([[1, 2], [3, 4.0]], MaskFormatError, "integers only; layer 1"),
        ([[1, True], [3, 4]], MaskFormatError, "integers only; layer 0"),
        ([[1, [2]], [3, [4]]], MaskFormatError, "integers only"),
        ([["1", "2"], ["3", "4"]], MaskFormatError, "integers only"),
    ],
)
def test_a_json_that_is_no_mask_is_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        import_keep_index(as_json(rows), ".json", base=BASE, shape=SHAPE)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (torch.tensor([[1, 2], [3, 11]]), MaskIndexError, "neuron 11"),
        (torch.tensor([[1, 2], [3, 3]]), MaskIndexError, "twice"),
        (torch.tensor([[1, 2]]), MaskShapeError, "1 layers"),
        (torch.tensor([1, 2]), MaskShapeError, r"of shape \[2\]"),
        (torch.zeros(0, dtype=torch.int64), MaskShapeError, "of shape"),
        (torch.arange(5000).reshape(2, 2500), MaskShapeError, "keeps 2500 neurons a layer"),
        (torch.zeros(1, dtype=torch.int64).expand(2, 10**9), MaskShapeError, "claims 2000000000 indices"),
        ([torch.zeros(1, dtype=torch.int64).expand(10**9)] * 2, MaskShapeError, "claims 1000000000"),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), MaskFormatError, "no plain integer tensor"),
        (torch.eye(2, dtype=torch.int64).to_sparse(), MaskFormatError, "plain"),
        ([torch.tensor([1, 2]), torch.tensor([3])], MaskShapeError, "ragged"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), MaskFormatError, "float32"),
        (torch.tensor([[True], [False]]), MaskFormatError, "bool"),
        ({"keep": torch.tensor([[1]])}, MaskFormatError, "no plain integer tensor"),
        ("text", MaskFormatError, "no plain integer tensor"),
        ([], MaskFormatError, "list of one list"),
    ],
)
def test_a_pt_that_is_no_mask_is_refused(content: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        import_keep_index(as_pt(content), ".pt", base=BASE, shape=SHAPE)


def test_a_pickle_is_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    for data in (pickle.dumps(Payload()), as_pt(Payload())):
        with pytest.raises(MaskFormatError, match="not a torch file of plain tensors"):
            import_keep_index(data, ".pt", base=BASE, shape=SHAPE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_truncated_files_are_refused(suffix: str) -> None:
    whole = as_pt(torch.tensor([[1, 2], [3, 4]])) if suffix == ".pt" else as_json([[1, 2], [3, 4]])
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        with pytest.raises(MaskFormatError):
            import_keep_index(whole[:length], suffix, base=BASE, shape=SHAPE)


def test_another_suffix_is_refused(tmp_path: Path, make_subnetwork: Callable[..., SubNetwork]) -> None:
    (tmp_path / "keep.npy").write_bytes(b"")
    with pytest.raises(MaskFormatError, match=r"'.npy' is no keep-index form; there are .pt and .json"):
        import_keep_index(tmp_path / "keep.npy", base=BASE, shape=SHAPE)
    with pytest.raises(MaskFormatError, match="None"):
        import_keep_index(b"[]", base=BASE, shape=SHAPE)
    with pytest.raises(MaskFormatError, match=r"'\.npy'"):
        export_keep_index(make_subnetwork(), tmp_path / "keep.npy")


def test_a_full_disk_leaves_the_old_export(
    tmp_path: Path, make_subnetwork: Callable[..., SubNetwork], full_disk: Callable[[], None]
) -> None:
    path = tmp_path / "keep.json"
    export_keep_index(make_subnetwork(), path)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(StorageFull):
        export_keep_index(make_subnetwork(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_index_of_every_neuron_is_a_mask() -> None:
    rows = np.tile(np.arange(11), (2, 1))
    assert import_keep_index(as_json(rows.tolist()), ".json", base=BASE, shape=SHAPE).mask.sparsity == 0
