"""What gathered packs are built from; their kernels are tested in test_gathered_ffn.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from masquerade_kernels.gathered import (
    GatheredLayer,
    GatheredSegment,
    GatheredWeights,
    gathered_layer_pack,
    gathered_pack,
    is_available,
    run_gathered_ffn,
)
from masquerade_kernels.packs import FFNLayer
from masquerade_masks import (
    EmptyLayer,
    FFNShape,
    Mask,
    MaskIndexError,
    MaskShapeError,
    NonFiniteMask,
    SettingError,
    SubNetwork,
)

CPU = torch.device("cpu")
SHAPE = FFNShape(num_layers=2, intermediate_size=40, hidden_size=8)


@dataclass
class Weights:
    made: list[FFNLayer]

    def layers(self) -> Iterator[FFNLayer]:
        yield from self.made


def subnetwork(seed: int, kept: int = 10, *, gain: bool = False, bias: bool = False) -> SubNetwork:
    generator = np.random.default_rng(seed)
    indices = np.stack([generator.permutation(SHAPE.intermediate_size)[:kept] for _ in range(SHAPE.num_layers)])
    return SubNetwork(
        "a-base",
        SHAPE,
        Mask.from_kept_indices(indices, SHAPE.intermediate_size),
        gain=generator.normal(1, 0.3, (SHAPE.num_layers, kept)).astype(np.float16) if gain else None,
        bias=generator.normal(0, 0.3, (SHAPE.num_layers, SHAPE.hidden_size)).astype(np.float16) if bias else None,
    )


def test_a_pack_is_the_union_of_its_members_masks() -> None:
    members = [subnetwork(seed, gain=seed == 1) for seed in range(3)]
    pack = gathered_pack(members, device=CPU)
    for layer in range(SHAPE.num_layers):
        used = np.logical_or.reduce([member.mask.to_dense()[layer] for member in members])
        neurons = pack.layers[layer].neurons.numpy()
        assert np.array_equal(neurons, np.flatnonzero(used))
        assert torch.equal(pack.layers[layer].coefficients[0], torch.ones(neurons.size))
        for member in members:
            row = pack.layers[layer].coefficients[pack.row_of[member.digest]].numpy()
            assert np.array_equal(row, member.coefficients()[layer, neurons])
    assert None not in pack.row_of


def test_layers_may_be_of_different_sizes() -> None:
    sizes = {len(layer.neurons) for layer in gathered_pack([subnetwork(1), subnetwork(2)], device=CPU).layers}
    assert len(sizes) == 2


def test_with_the_base_every_neuron_is_read() -> None:
    pack = gathered_pack([subnetwork(1)], device=CPU, with_base=True)
    assert pack.row_of[None] == 0
    assert all(torch.equal(layer.neurons, torch.arange(40, dtype=torch.int32)) for layer in pack.layers)


def test_one_persona_twice_is_one_row() -> None:
    pack = gathered_pack([subnetwork(1), subnetwork(1)], device=CPU)
    assert [len(layer.coefficients) for layer in pack.layers] == [2, 2]


def test_biases_of_members_that_have_none_are_zero() -> None:
    without, biased = subnetwork(1), subnetwork(2, bias=True)
    pack = gathered_pack([without, biased], device=CPU)
    expected = biased.biases()
    assert expected is not None
    for layer, content in enumerate(pack.layers):
        assert content.biases is not None
        assert content.biases[[0, pack.row_of[without.digest]]].abs().sum() == 0
        assert np.array_equal(content.biases[pack.row_of[biased.digest]].numpy(), expected[layer])
    assert all(layer.biases is None for layer in gathered_pack([without], device=CPU).layers)


def test_bytes_are_indices_and_coefficients_only() -> None:
    pack = gathered_pack([subnetwork(1, kept=10)], device=CPU)
    assert pack.num_bytes == SHAPE.num_layers * (10 * 4 + 2 * 10 * 4)


def test_a_pack_of_nobody_is_refused() -> None:
    with pytest.raises(MaskShapeError, match="at least one persona"):
        gathered_pack([], device=CPU)


def test_personas_of_another_base_are_refused() -> None:
    wide = FFNShape(2, 48, 8)
    other = SubNetwork("b", wide, Mask.from_kept_indices(np.arange(5)[None].repeat(2, 0), 48))
    with pytest.raises(MaskShapeError, match="one base"):
        gathered_pack([subnetwork(1), other], device=CPU)


def layer_pack(neurons: list[int], columns: int | None = None, dtype: type = np.int32, **changes: object) -> None:
    arguments = {
        "neurons": np.array(neurons, dtype=dtype),
        "coefficients": np.ones((2, len(neurons) if columns is None else columns), dtype=np.float32),
    } | changes
    gathered_layer_pack(**arguments, shape=SHAPE, device=CPU, layer=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("neurons", [[-1, 3], [3, 40], [5, 5], [7, 3]])
def test_neurons_that_are_not_an_ascending_set_are_refused(neurons: list[int]) -> None:
    with pytest.raises(MaskIndexError) as refused:
        layer_pack(neurons)
    assert refused.value.layer == 1


def test_an_empty_layer_is_refused() -> None:
    with pytest.raises(EmptyLayer):
        layer_pack([])


def test_rows_of_another_shape_or_dtype_are_refused() -> None:
    with pytest.raises(MaskShapeError, match=r"coefficients are float32 \[num_rows, 2\]"):
        layer_pack([1, 2], columns=3)
    with pytest.raises(MaskShapeError, match="float64"):
        layer_pack([1, 2], coefficients=np.ones((2, 2)))
    with pytest.raises(MaskShapeError, match="int32"):
        layer_pack([1, 2], dtype=np.int64)
    with pytest.raises(MaskShapeError, match=r"biases are float32 \[num_rows, 8\]"):
        layer_pack([1, 2], biases=np.zeros((2, 9), dtype=np.float32))
    with pytest.raises(MaskShapeError, match="a row for each"):
        layer_pack([1, 2], biases=np.zeros((3, 8), dtype=np.float32))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteMask, match="coefficients of layer 1"):
        layer_pack([1, 2], coefficients=np.array([[1, np.nan]], dtype=np.float32))


def test_weights_hold_down_transposed() -> None:
    made = [FFNLayer(torch.randn(40, 8), torch.randn(40, 8), torch.randn(8, 40)) for _ in range(2)]
    weights = GatheredWeights.of(Weights(made), dtype=torch.bfloat16, device=CPU)
    assert weights.shape == SHAPE
    for layer, content in zip(made, weights.layers, strict=True):
        assert torch.equal(content.down_t, layer.down.T.bfloat16())
        assert content.down_t.is_contiguous()


def test_gate_and_up_may_share_one_matrix() -> None:
    stacked = torch.randn(80, 8)
    weights = GatheredWeights.of(
        Weights([FFNLayer(stacked[:40], stacked[40:], torch.randn(8, 40))]), dtype=torch.float32, device=CPU
    )
    assert weights.layers[0].up.data_ptr() == stacked[40:].data_ptr()


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.randn(40, 9), "intermediate, hidden"),
        (torch.randn(8, 40).T, "contiguous"),
        (torch.randn(40, 8).double(), "float64"),
        (torch.randn(40, 8).half(), "float16"),
    ],
)
def test_weights_that_the_kernels_could_not_read_are_refused(weight: torch.Tensor, named: str) -> None:
    with pytest.raises(MaskShapeError, match=named):
        GatheredLayer(torch.randn(40, 8), torch.randn(40, 8), weight)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter makes a CPU a device")
def test_a_cpu_is_no_device_for_gathered_packs() -> None:
    assert not is_available(CPU)
    weights = GatheredWeights((GatheredLayer(torch.randn(40, 8), torch.randn(40, 8), torch.randn(40, 8)),))
    pack = gathered_pack([subnetwork(1)], device=CPU)
    segment = GatheredSegment(0, 1, pack, torch.ones(1, dtype=torch.int32))
    with pytest.raises(SettingError, match="CUDA GPU"):
        run_gathered_ffn(torch.randn(1, 8), 0, [segment], weights)


def test_the_package_does_not_need_triton() -> None:
    """macOS and Windows have none: nothing may import it before a kernel runs."""
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from masquerade_kernels import gathered; "
        "import masquerade_kernels.persona_ffn; print(gathered.is_available(torch.device('cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "False", done.stderr
