"""What gathered packs are built from; their kernels are tested in test_gathered_ffn.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from masquerade_kernels.gathered import (
    GatheredLayer,
    GatheredLayerPack,
    GatheredWeights,
    can_gather,
    gathered_ffn,
    gathered_layer_pack,
)
from masquerade_kernels.packs import FFNLayer, LayerPack, Pack, PackFormat, gathered_dense_pack, member_pack
from masquerade_masks import (
    Attached,
    EmptyLayer,
    FFNShape,
    Mask,
    MaskIndexError,
    MaskShapeError,
    NonFiniteMask,
    SettingError,
    SubNetwork,
)
from masquerade_masks.attached import Kind

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


def base_weights() -> Weights:
    return Weights([FFNLayer(torch.randn(40, 8), torch.randn(40, 8), torch.randn(8, 40)) for _ in range(2)])


def gathered_form() -> PackFormat:
    return PackFormat(torch.float32, CPU, gathered=GatheredWeights.of(base_weights(), dtype=torch.float32, device=CPU))


class NotRead:
    """A checkpoint that gathered packs have no need of."""

    def layers(self) -> Iterator[FFNLayer]:
        raise AssertionError


def pack_of(*members: SubNetwork, form: PackFormat | None = None) -> tuple[Pack, list[GatheredLayerPack]]:
    pack = member_pack(NotRead(), members, form or gathered_form())
    layers = [layer for layer in pack.layers if isinstance(layer, GatheredLayerPack)]
    assert len(layers) == SHAPE.num_layers
    return pack, layers


def test_a_pack_is_the_union_of_its_members_masks_and_no_more() -> None:
    members = [subnetwork(seed, gain=seed == 1) for seed in range(3)]
    pack, layers = pack_of(*members)
    assert pack.members == tuple(member.digest for member in members)
    for index, layer in enumerate(layers):
        used = np.logical_or.reduce([member.mask.to_dense()[index] for member in members])
        assert np.array_equal(layer.neurons.numpy(), np.flatnonzero(used))
        assert layer.coefficients is not None
        for row, member in zip(layer.coefficients.numpy(), members, strict=True):
            assert np.array_equal(row, member.coefficients()[index, layer.neurons.numpy()])
    assert pack.fraction == sum(len(layer.neurons) for layer in layers) / 80


def test_layers_may_be_of_different_sizes() -> None:
    _, layers = pack_of(subnetwork(1), subnetwork(2))
    assert len({len(layer.neurons) for layer in layers}) == 2


def test_one_persona_without_gains_is_an_index_list() -> None:
    pack, layers = pack_of(subnetwork(1, kept=10))
    assert all(layer.coefficients is None and layer.biases is None for layer in layers)
    assert pack.num_bytes == SHAPE.num_layers * 10 * 4


def test_biases_of_members_that_have_none_are_zero() -> None:
    without, biased = subnetwork(1), subnetwork(2, bias=True)
    expected = biased.biases()
    assert expected is not None
    for index, layer in enumerate(pack_of(without, biased)[1]):
        assert layer.biases is not None
        assert layer.biases[0].abs().sum() == 0
        assert np.array_equal(layer.biases[1].numpy(), expected[index])


def test_every_pack_reads_the_same_weights() -> None:
    form = gathered_form()
    assert form.gathered is not None
    dense = gathered_dense_pack(form.gathered)
    _, layers = pack_of(subnetwork(1), form=form)
    x = torch.randn(3, 8)
    for base, first, pack in zip(form.gathered.layers, dense.layers, layers, strict=True):
        assert pack.weights is base
        assert isinstance(first, LayerPack)
        assert torch.equal(first.gate_up(x), torch.cat([x @ base.gate.T, x @ base.up.T], dim=1))
        base.gate_up.zero_()
        base.down_t.zero_()
        assert first.gate_up(x).abs().sum() == 0  # no copy
        assert first.down(torch.randn(3, 40)).abs().sum() == 0


@pytest.mark.parametrize(("kind", "held"), [("lora", False), ("full", True), (None, True)])
def test_own_weights_are_copied_and_low_rank_updates_are_in_no_pack(
    kind: Kind | None, held: bool, make_attached: Callable[..., Attached]
) -> None:
    form, plain = gathered_form(), subnetwork(1)
    member = plain if kind is None else replace(plain, weights=make_attached(kind, SHAPE, 10))
    assert form.holds(member) == held
    if kind == "full":
        pack = member_pack(NotRead(), [member], form)
        assert all(isinstance(layer, LayerPack) for layer in pack.layers)
    if kind == "lora":
        with pytest.raises(AssertionError, match="dense pack"):
            pack_of(member, form=form)
        assert PackFormat(torch.float32, CPU).holds(member)


def layer_pack(neurons: list[int], columns: int | None = None, dtype: type = np.int32, **changes: object) -> None:
    arguments = {
        "weights": GatheredLayer(torch.randn(80, 8), torch.randn(40, 8)),
        "neurons": np.array(neurons, dtype=dtype),
        "coefficients": np.ones((2, len(neurons) if columns is None else columns), dtype=np.float32),
    } | changes
    gathered_layer_pack(**arguments, layer=1)  # type: ignore[arg-type]


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


def test_weights_are_stacked_and_down_is_transposed() -> None:
    made = base_weights()
    weights = GatheredWeights.of(made, dtype=torch.bfloat16, device=CPU)
    for layer, content in zip(made.made, weights.layers, strict=True):
        assert torch.equal(content.gate, layer.gate.bfloat16())
        assert torch.equal(content.up, layer.up.bfloat16())
        assert content.up.data_ptr() == content.gate_up[40:].data_ptr()
        assert torch.equal(content.down_t, layer.down.T.bfloat16())
        assert content.down_t.is_contiguous()


@pytest.mark.parametrize(
    ("gate_up", "named"),
    [
        (torch.randn(80, 9), "2 intermediate, hidden"),
        (torch.randn(40, 8), "2 intermediate, hidden"),
        (torch.randn(8, 80).T, "contiguous"),
        (torch.randn(80, 8).double(), "float64"),
        (torch.randn(80, 8).half(), "float16"),
    ],
)
def test_weights_that_the_kernels_could_not_read_are_refused(gate_up: torch.Tensor, named: str) -> None:
    with pytest.raises(MaskShapeError, match=named):
        GatheredLayer(gate_up, torch.randn(40, 8))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter makes a CPU a device")
def test_a_cpu_is_no_device_for_gathered_packs() -> None:
    assert not can_gather(CPU)
    _, layers = pack_of(subnetwork(1))
    with pytest.raises(SettingError, match="CUDA GPU"):
        gathered_ffn(torch.randn(1, 8), layers[0].weights, layers[0].neurons, None, None)


def test_the_package_does_not_need_triton() -> None:
    """macOS and Windows have none: nothing may import it before a kernel runs."""
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from masquerade_kernels import gathered; "
        "import masquerade_kernels.persona_ffn; print(gathered.can_gather(torch.device('cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "False", done.stderr
