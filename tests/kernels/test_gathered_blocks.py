from __future__ import annotations

import itertools

import pytest

from masquerade_kernels.gathered_blocks import choose_blocks

SHAPES = [(3072, 8192), (4096, 14336), (576, 1536), (40, 7)]  # hidden, intermediate


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES)
def test_every_size_is_one_that_triton_takes(hidden: int, intermediate: int, itemsize: int) -> None:
    for tokens, kept in itertools.product([1, 3, 16, 17, 64, 65, 256, 2000], [1, intermediate // 2, intermediate]):
        blocks = choose_blocks(tokens, kept, hidden, itemsize=itemsize, num_sms=132)
        gate_up, down = blocks.gate_up, blocks.down
        for size in (gate_up.tokens, gate_up.neurons, gate_up.hidden, down.tokens, down.neurons, down.hidden):
            assert is_power_of_two(size)
            assert size >= 16
        assert is_power_of_two(down.num_splits)
        assert (down.num_splits - 1) * down.neurons < max(kept, down.neurons)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(("hidden", "intermediate"), SHAPES[:2])
def test_decoding_fills_the_device_in_one_wave(hidden: int, intermediate: int, sparsity: float) -> None:
    kept = round(intermediate * (1 - sparsity))
    for tokens in (1, 8, 16):
        blocks = choose_blocks(tokens, kept, hidden, itemsize=2, num_sms=132)
        gate_up_programs = -(-kept // blocks.gate_up.neurons)
        down_programs = -(-hidden // blocks.down.hidden) * blocks.down.num_splits
        for programs in (gate_up_programs, down_programs):
            assert 0.7 * 132 <= programs <= 2 * 132


def test_partial_sums_stay_below_half_of_the_weights_bytes() -> None:
    for tokens in (1, 16, 64, 128, 1024):
        down = choose_blocks(tokens, 4096, 3072, itemsize=2, num_sms=132).down
        assert down.num_splits == 1 or 8 * tokens * down.num_splits <= 4096 * 2 / 2


def test_many_tokens_need_no_splits() -> None:
    assert choose_blocks(2048, 8192, 3072, itemsize=2, num_sms=132).down.num_splits == 1
