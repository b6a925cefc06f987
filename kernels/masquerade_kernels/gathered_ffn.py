"""The gathered FFN in Triton: gate, up, SiLU and coefficients in one kernel, down in another, split over neurons.

Importing this module imports triton; `masquerade_kernels.gathered` does so on first use. With `TRITON_INTERPRET=1` set
before triton is first imported, the same kernels run on the CPU.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from masquerade_kernels.gathered_blocks import DownBlocks, FFNBlocks, GateUpBlocks

INTERPRETED = bool(triton.knobs.runtime.interpret)

_REDUCE_BLOCK = 256  # columns a program of the reduction: 16 bytes a lane of two warps
_FUSE = {"enable_fp_fusion": True}  # triton 3.9 warns where it is left to a default that is about to change


def launch(
    x: torch.Tensor,  # [num_tokens, hidden]
    gate: torch.Tensor,  # [intermediate, hidden]
    up: torch.Tensor,  # [intermediate, hidden]
    down_t: torch.Tensor,  # [intermediate, hidden]
    neurons: torch.Tensor,  # int32 [|U|]
    coefficients: torch.Tensor | None,  # float32 [num_rows, |U| or intermediate]
    persona_of_token: torch.Tensor | None,  # int32 or int64 [num_tokens]
    biases: torch.Tensor | None,  # float32 [num_rows, hidden]
    out: torch.Tensor,  # [num_tokens, hidden]
    blocks: FFNBlocks,
) -> None:
    """Write the FFN of one segment over the rows U into `out`. Shapes and dtypes are the caller's to have checked."""
    num_tokens, hidden_size = x.shape
    num_neurons = neurons.shape[0]
    h_stride = triton.cdiv(num_neurons, blocks.down.neurons) * blocks.down.neurons  # the last block is read whole
    h = torch.empty((num_tokens, h_stride), dtype=x.dtype, device=x.device)
    dot_float32 = INTERPRETED or x.dtype == torch.float32
    _launch_gate_up(x, gate, up, neurons, coefficients, persona_of_token, h, blocks.gate_up, dot_float32)

    grid, num_blocks = _down_grid(num_tokens, num_neurons, hidden_size, blocks.down)
    num_splits = grid[2]
    sums = out if num_splits == 1 else torch.empty((num_splits, num_tokens, hidden_size), device=x.device)
    down_kernel[grid](
        h,
        down_t,
        neurons,
        biases if num_splits == 1 else None,
        persona_of_token,
        sums,
        num_tokens,
        num_neurons,
        hidden_size,
        h_stride,
        num_blocks,
        BLOCK_T=blocks.down.tokens,
        BLOCK_U=blocks.down.neurons,
        BLOCK_H=blocks.down.hidden,
        EVEN_H=hidden_size % blocks.down.hidden == 0,
        STREAM=grid[0] == 1,
        DOT_FLOAT32=dot_float32,
        num_warps=blocks.down.num_warps,
        num_stages=blocks.down.num_stages,
        **_FUSE,
    )
    if num_splits > 1:
        sum_splits_kernel[(num_tokens, triton.cdiv(hidden_size, _REDUCE_BLOCK))](
            sums,
            biases,
            persona_of_token,
            out,
            num_tokens,
            hidden_size,
            NUM_SPLITS=num_splits,
            BLOCK_H=_REDUCE_BLOCK,
            num_warps=2,
            **_FUSE,
        )


def _launch_gate_up(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    neurons: torch.Tensor,
    coefficients: torch.Tensor | None,
    persona_of_token: torch.Tensor | None,
    h: torch.Tensor,
    blocks: GateUpBlocks,
    dot_float32: bool,
) -> None:
    (num_tokens, hidden_size), num_neurons = x.shape, neurons.shape[0]
    grid = (triton.cdiv(num_tokens, blocks.tokens), triton.cdiv(num_neurons, blocks.neurons))
    num_columns = num_neurons if coefficients is None else coefficients.shape[1]
    gate_up_kernel[grid](
        x,
        gate,
        up,
        neurons,
        coefficients,
        persona_of_token,
        h,
        num_tokens,
        num_neurons,
        hidden_size,
        num_columns,
        h.shape[1],
        BLOCK_T=blocks.tokens,
        BLOCK_U=blocks.neurons,
        BLOCK_K=blocks.hidden,
        EVEN_K=hidden_size % blocks.hidden == 0,
        BY_NEURON=num_columns != num_neurons,
        STREAM=grid[0] == 1,
        DOT_FLOAT32=dot_float32,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **_FUSE,
    )


def _down_grid(
    num_tokens: int, num_neurons: int, hidden_size: int, blocks: DownBlocks
) -> tuple[tuple[int, int, int], int]:
    """Programs over tokens, columns and splits; and how many blocks of neurons a split sums."""
    num_blocks = triton.cdiv(triton.cdiv(num_neurons, blocks.neurons), blocks.num_splits)
    num_splits = triton.cdiv(num_neurons, num_blocks * blocks.neurons)  # none is empty
    return (triton.cdiv(num_tokens, blocks.tokens), triton.cdiv(hidden_size, blocks.hidden), num_splits), num_blocks


# What varies between steps is not specialised on: a new kernel would be compiled in the middle of serving. The
# innermost grid axis is the tokens', so that programs that read the same weights run side by side and find them in L2.


@triton.jit(
    do_not_specialize=["num_tokens", "num_neurons", "coefficient_stride"],
    do_not_specialize_on_alignment=["neurons_ptr", "coefficients_ptr", "persona_of_token_ptr"],
)
def gate_up_kernel(
    x_ptr,  # [num_tokens, hidden]
    gate_ptr,  # [intermediate, hidden]
    up_ptr,  # [intermediate, hidden]
    neurons_ptr,  # int32 [num_neurons]
    coefficients_ptr,  # float32 [num_rows, coefficient_stride] or None
    persona_of_token_ptr,  # [num_tokens]
    h_ptr,  # [num_tokens, h_stride]
    num_tokens,
    num_neurons,
    hidden,
    coefficient_stride,
    h_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # hidden is a multiple of BLOCK_K
    BY_NEURON: tl.constexpr,  # coefficients have a column a neuron of the base, not of U
    STREAM: tl.constexpr,  # every weight is read once in this launch
    DOT_FLOAT32: tl.constexpr,
):
    """`h[t, u] = silu(x_t . gate[U_u]) * (x_t . up[U_u]) * c[persona of t, u]`, accumulated in float32."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    is_token = token < num_tokens
    is_kept = position < num_neurons
    # Beyond the end the last neuron is read again (from L2) and not stored, which spares the loop a mask.
    neuron = tl.load(neurons_ptr + tl.minimum(position, num_neurons - 1))
    weights_policy: tl.constexpr = "evict_first" if STREAM else ""

    row = neuron.to(tl.int64) * hidden
    x_rows = x_ptr + token.to(tl.int64)[:, None] * hidden
    gates = tl.zeros((BLOCK_T, BLOCK_U), dtype=tl.float32)
    ups = tl.zeros((BLOCK_T, BLOCK_U), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_rows + column[None, :], mask=is_token[:, None], other=0.0)
            gate = tl.load(gate_ptr + row[:, None] + column[None, :], eviction_policy=weights_policy)
            up = tl.load(up_ptr + row[:, None] + column[None, :], eviction_policy=weights_policy)
        else:
            inside = (column < hidden)[None, :]
            x = tl.load(x_rows + column[None, :], mask=is_token[:, None] & inside, other=0.0)
            gate = tl.load(gate_ptr + row[:, None] + column[None, :], mask=inside, other=0.0)
            up = tl.load(up_ptr + row[:, None] + column[None, :], mask=inside, other=0.0)
        if DOT_FLOAT32:
            x = x.to(tl.float32)
            gate = gate.to(tl.float32)
            up = up.to(tl.float32)
        gates = tl.dot(x, tl.trans(gate), gates, input_precision="ieee")
        ups = tl.dot(x, tl.trans(up), ups, input_precision="ieee")

    stored = is_token[:, None] & is_kept[None, :]
    h = gates * tl.sigmoid(gates) * ups
    if coefficients_ptr is not None:
        persona = tl.load(persona_of_token_ptr + token, mask=is_token, other=0).to(tl.int32)
        coefficient_column = neuron if BY_NEURON else position
        coefficient = coefficients_ptr + persona[:, None] * coefficient_stride + coefficient_column[None, :]
        h *= tl.load(coefficient, mask=stored, other=0.0)
    tl.store(h_ptr + token[:, None] * h_stride + position[None, :], h.to(h_ptr.dtype.element_ty), mask=stored)


@triton.jit(
    do_not_specialize=["num_tokens", "num_neurons", "num_blocks"],
    do_not_specialize_on_alignment=["neurons_ptr", "persona_of_token_ptr", "biases_ptr"],
)
def down_kernel(
    h_ptr,  # [num_tokens, h_stride]
    down_t_ptr,  # [intermediate, hidden]
    neurons_ptr,  # int32 [num_neurons]
    biases_ptr,  # float32 [num_rows, hidden] or None; with one split only
    persona_of_token_ptr,  # [num_tokens]
    sums_ptr,  # [num_tokens, hidden] with one split, else float32 [num_splits, num_tokens, hidden]
    num_tokens,
    num_neurons,
    hidden,
    h_stride,
    num_blocks,  # blocks of neurons a split
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,  # hidden is a multiple of BLOCK_H
    STREAM: tl.constexpr,  # every weight is read once in this launch
    DOT_FLOAT32: tl.constexpr,
):
    """`sums[split, t] = sum of h[t, u] * down_t[U_u]` over the split's share of U, in float32."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(2)
    is_token = token < num_tokens
    is_column = column < hidden
    weights_policy: tl.constexpr = "evict_first" if STREAM else ""

    first = split * num_blocks * BLOCK_U
    last = tl.minimum(first + num_blocks * BLOCK_U, num_neurons)
    h_rows = h_ptr + token.to(tl.int64)[:, None] * h_stride
    sums = tl.zeros((BLOCK_T, BLOCK_H), dtype=tl.float32)
    # Which rows come next is known an iteration ahead, so that no weight waits for its index.
    neuron = tl.load(neurons_ptr + tl.minimum(first + tl.arange(0, BLOCK_U), num_neurons - 1))
    for start in range(first, last, BLOCK_U):
        position = start + tl.arange(0, BLOCK_U)
        is_kept = position < last
        row = neuron.to(tl.int64) * hidden
        # A mask along the row would forbid wide loads; the row is long enough, and what lies behind U is dropped here.
        h = tl.load(h_rows + position[None, :], mask=is_token[:, None], other=0.0)
        h = tl.where(is_kept[None, :], h, 0.0)
        read = is_kept[:, None] if EVEN_H else is_kept[:, None] & is_column[None, :]
        down = tl.load(
            down_t_ptr + row[:, None] + column[None, :], mask=read, other=0.0, eviction_policy=weights_policy
        )
        if DOT_FLOAT32:
            h = h.to(tl.float32)
            down = down.to(tl.float32)
        sums = tl.dot(h, down, sums, input_precision="ieee")
        neuron = tl.load(neurons_ptr + tl.minimum(position + BLOCK_U, num_neurons - 1))

    stored = is_token[:, None] & is_column[None, :]
    if biases_ptr is not None:
        persona = tl.load(persona_of_token_ptr + token, mask=is_token, other=0).to(tl.int64)
        sums += tl.load(biases_ptr + persona[:, None] * hidden + column[None, :], mask=stored, other=0.0)
    out_row = split.to(tl.int64) * num_tokens + token
    tl.store(sums_ptr + out_row[:, None] * hidden + column[None, :], sums.to(sums_ptr.dtype.element_ty), mask=stored)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["persona_of_token_ptr", "biases_ptr"],
)
def sum_splits_kernel(
    sums_ptr,  # float32 [NUM_SPLITS, num_tokens, hidden]
    biases_ptr,  # float32 [num_rows, hidden] or None
    persona_of_token_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, hidden]
    num_tokens,
    hidden,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`out[t] = sum over splits, in their order, + bias[persona of t]`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(sums_ptr + (split * num_tokens + token) * hidden + column, mask=inside, other=0.0)
    if biases_ptr is not None:
        persona = tl.load(persona_of_token_ptr + token).to(tl.int64)
        total += tl.load(biases_ptr + persona * hidden + column, mask=inside, other=0.0)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=inside)
