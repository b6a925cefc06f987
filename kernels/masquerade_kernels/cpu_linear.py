"""Linear layers of few rows on CPUs with bf16 dot products (AVX512-BF16): one compiled loop, and weights read once.

oneDNN's product costs 19 us a call before it computes anything, a hundred times a step, and compiles a kernel for each
number of rows. These loops cost 3 us and take any number. A row's sums are taken in one order whatever rows stand
beside it, so that its output is the same to the bit alone and in a batch. Where float32 is multiplied faster
(`cpu_dots.multiplies_float32_faster`) weights are widened on their way from memory, and rows come widened.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import carray, prange, types
from numba.extending import intrinsic

from masquerade_kernels import cpu_dots as dots
from masquerade_kernels.cpu_dots import LANES
from masquerade_kernels.cpu_values import Loop, by_size, exp, pointer, prefetch, stored_as

if TYPE_CHECKING:
    import torch


_MOST_ROWS = 16  # summed together, each in a register of its own, for one vector of outputs
_PARALLEL_PRODUCTS = 1 << 16  # from which a second thread earns its start
_AHEAD = 4096  # bytes between the weights that are fetched and those that are used


def in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` in bf16 as int32 `[⌈out / 16⌉, in / 2, 16]`: of 16 outputs, one pair of inputs after another.

    `in` is even. Outputs are filled up with zeros.
    """
    import torch  # noqa: PLC0415

    out_features, in_features = weight.shape
    pairs = weight.contiguous().view(torch.int32)  # [out, in / 2]
    missing = -out_features % LANES
    if missing:
        pairs = torch.cat([pairs, pairs.new_zeros(missing, in_features // 2)])
    return pairs.view(-1, LANES, in_features // 2).transpose(1, 2).contiguous()


@functools.cache
def linear_loop(num_threads: int) -> Loop:
    """`linear` below."""
    return by_size(_linear(), _PARALLEL_PRODUCTS, num_threads)


@functools.cache
def gated_loop(num_threads: int) -> Loop:
    """`gated` below."""
    return by_size(_gated(), _PARALLEL_PRODUCTS, num_threads)


@intrinsic
def _products(
    context: Any,
    wide: Any,  # 0 or 1: whether x is float32
    num_rows: Any,  # 1 to 16
    x_at: Any,  # bf16 or float32 [num_rows, 2 num_pairs]
    weights_at: Any,  # [num_pairs, 16] pairs
    num_pairs: Any,
    sums_at: Any,  # float32 [num_rows, 16]
) -> Any:
    """Products of a few rows with one vector of outputs, summed in registers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        is_wide, count, *others = arguments
        after = builder.append_basic_block("summed")
        kinds = [(widened, rows) for widened in (0, 1) for rows in range(1, _MOST_ROWS + 1)]
        cases = [builder.append_basic_block(f"rows{rows}") for _, rows in kinds]
        number = builder.add(dots.times(builder, is_wide, _MOST_ROWS), count)
        switch = builder.switch(number, cases[-1])
        for case, ((widened, rows), block) in enumerate(zip(kinds, cases, strict=True), start=1):
            if block is not cases[-1]:
                switch.add_case(dots.long(case), block)
            builder.position_at_end(block)
            _sum_rows(builder, bool(widened), rows, *others)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(wide, num_rows, x_at, weights_at, num_pairs, sums_at), generate


def _sum_rows(
    builder: Any, wide: bool, num_rows: int, x_at: Any, weights_at: Any, num_pairs: Any, sums_at: Any
) -> None:
    """Emit the loop over the pairs of inputs for one number of rows."""
    pair_bytes = 8 if wide else 4
    before, loop = builder.block, builder.append_basic_block("pairs")
    after = builder.append_basic_block("stored")
    builder.branch(loop)

    builder.position_at_end(loop)
    pair = builder.phi(dots.LONG)
    sums = [builder.phi(dots.SUMS) for _ in range(num_rows)]
    at = builder.add(weights_at, dots.times(builder, pair, 4 * LANES))
    weights = dots.load(builder, at, dots.PAIRS)
    dots.fetch(builder, builder.add(at, dots.long(_AHEAD)))
    column = builder.add(x_at, dots.times(builder, pair, pair_bytes))
    halves = dots.widened(builder, weights) if wide else None
    summed = []
    for row, one in enumerate(sums):
        at = builder.add(column, dots.times(builder, num_pairs, pair_bytes * row))
        if halves is None:
            summed.append(
                dots.dot(builder, one, weights, dots.in_all_lanes(builder, dots.load(builder, at, dots.WORD)))
            )
        else:
            first, second = (
                dots.in_all_lanes(builder, dots.load(builder, builder.add(at, dots.long(offset)), dots.FLOAT))
                for offset in (0, 4)
            )
            of_first = dots.multiply_add(builder, halves[0], first, one)
            summed.append(dots.multiply_add(builder, halves[1], second, of_first))
    following = builder.add(pair, dots.long(1))
    pair.add_incoming(dots.long(0), before)
    pair.add_incoming(following, loop)
    for one, then in zip(sums, summed, strict=True):
        one.add_incoming(dots.zeros(), before)
        one.add_incoming(then, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)

    builder.position_at_end(after)
    for row, one in enumerate(summed):
        dots.store(builder, one, builder.add(sums_at, dots.long(4 * LANES * row)))


def _linear() -> Loop:
    def linear(
        num_products: int,  # of the whole call, multiplications
        num_rows: int,
        wide: int,  # 0 or 1: whether x is float32
        num_pairs: int,  # of inputs
        out_features: int,
        x_at: int,  # bf16 or float32 [num_rows, 2 num_pairs]
        weights_at: int,  # as `in_blocks` lays them out
        bias_at: int,  # float32 [out_features]; 0: none
        out_at: int,  # bf16 [num_rows, out_features]
    ) -> None:
        """`out = x Wᵀ + bias`, rounded once."""
        bias = carray(pointer(bias_at), (out_features,), np.float32)
        row_bytes = num_pairs * (8 if wide else 4)
        for block in prange((out_features + LANES - 1) // LANES):
            sums = np.empty((_MOST_ROWS, LANES), np.float32)
            first = block * LANES
            width = min(LANES, out_features - first)
            weights = weights_at + block * num_pairs * 4 * LANES
            for start in range(0, num_rows, _MOST_ROWS):
                taken = min(_MOST_ROWS, num_rows - start)
                _products(wide, taken, x_at + start * row_bytes, weights, num_pairs, sums.ctypes.data)
                if bias_at != 0:
                    for r in range(taken):
                        for lane in range(width):
                            sums[r, lane] += bias[first + lane]
                for r in range(taken):
                    target_at = out_at + ((start + r) * out_features + first) * 2
                    if width == LANES:
                        target, own = carray(pointer(target_at), (LANES,), np.uint16), sums[r]
                        for lane in range(LANES):  # over places that are known to be there: in vectors
                            target[lane] = stored_as(own[lane], target[lane])
                    else:
                        rest = carray(pointer(target_at), (width,), np.uint16)
                        for lane in range(width):
                            rest[lane] = stored_as(sums[r, lane], rest[lane])

    return linear


def _gated() -> Loop:
    def gated(
        num_products: int,  # of the whole call, multiplications
        num_rows: int,
        wide: int,  # 0 or 1: whether x is float32
        num_pairs: int,  # of inputs
        num_neurons: int,  # a multiple of 16
        x_at: int,  # bf16 or float32 [num_rows, 2 num_pairs]
        weights_at: int,  # the gates' outputs, then the ups', as `in_blocks` lays them out
        coefficients_at: int,  # float32 [.., num_neurons]; 0: all of them 1
        personas_at: int,  # int64 [num_rows]: rows of `coefficients`
        out_at: int,  # bf16 [num_rows, num_neurons]
    ) -> None:
        """`out = silu(x Gᵀ) * (x Uᵀ) * coefficient`, rounded once."""
        personas = carray(pointer(personas_at), (num_rows,), np.int64)
        block_bytes, row_bytes = num_pairs * 4 * LANES, num_pairs * (8 if wide else 4)
        ups_at = weights_at + num_neurons // LANES * block_bytes
        for block in prange(num_neurons // LANES):
            gates, ups = np.empty((_MOST_ROWS, LANES), np.float32), np.empty((_MOST_ROWS, LANES), np.float32)
            first, at = block * LANES, block * block_bytes
            for start in range(0, num_rows, _MOST_ROWS):
                taken, x_rows_at = min(_MOST_ROWS, num_rows - start), x_at + start * row_bytes
                if coefficients_at != 0:  # a line of each row's own, which come while the products are summed
                    for r in range(taken):
                        prefetch(coefficients_at + (personas[start + r] * num_neurons + first) * 4)
                _products(wide, taken, x_rows_at, weights_at + at, num_pairs, gates.ctypes.data)
                _products(wide, taken, x_rows_at, ups_at + at, num_pairs, ups.ctypes.data)
                for r in range(taken):
                    gate, up = gates[r], ups[r]
                    for lane in range(LANES):
                        up[lane] *= gate[lane] / (np.float32(1.0) + exp(-gate[lane]))
                    if coefficients_at != 0:
                        own_at = coefficients_at + (personas[start + r] * num_neurons + first) * 4
                        own = carray(pointer(own_at), (LANES,), np.float32)
                        for lane in range(LANES):
                            up[lane] *= own[lane]
                    target_at = out_at + ((start + r) * num_neurons + first) * 2
                    target = carray(pointer(target_at), (LANES,), np.uint16)
                    for lane in range(LANES):
                        target[lane] = stored_as(up[lane], target[lane])

    return gated
