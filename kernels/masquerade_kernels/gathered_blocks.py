"""Block sizes of the gathered FFN's kernels: a fixed table by tokens, plain data, no torch.

Chosen by reasoning for Hopper (132 multiprocessors, 228 KiB of shared memory each, 50 MB of L2) and not measured on a
GPU yet; `benchmarks/gathered_ffn.py --sweep` tries others. Nothing is tuned at run time, so that one process computes
the same sums in the same order from its first step to its last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_MAX_SPLITS = 16  # the reduction reads all of a column's partial sums at once


@dataclass(frozen=True, slots=True)
class GateUpBlocks:
    """One program computes `tokens` x `neurons` activations, `hidden` columns of the weights at a time."""

    tokens: int
    neurons: int
    hidden: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DownBlocks:
    """One program sums `tokens` x `hidden` outputs over its share of the neurons, `neurons` rows at a time."""

    tokens: int
    neurons: int
    hidden: int
    num_splits: int  # programs that share one block of outputs; a power of two
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class FFNBlocks:
    """Blocks of both kernels for one segment."""

    gate_up: GateUpBlocks
    down: DownBlocks


def choose_blocks(num_tokens: int, num_neurons: int, hidden_size: int, *, itemsize: int, num_sms: int) -> FFNBlocks:
    """Blocks for `num_tokens` of a segment, `num_neurons` rows of `hidden_size` values of `itemsize` bytes."""
    if itemsize == 4:
        # float32 multiplies on the ordinary cores (tensor cores would round to tf32): small tiles, no serving dtype.
        gate_up = GateUpBlocks(tokens=16, neurons=32, hidden=32, num_warps=4, num_stages=3)
        down = DownBlocks(tokens=16, neurons=32, hidden=64, num_splits=1, num_warps=4, num_stages=3)
    else:
        tokens = _token_block(num_tokens)
        gate_up, down = _gate_up(tokens, num_neurons, num_sms), _down(tokens)
    splits = _num_splits(down, num_tokens, num_neurons, hidden_size, itemsize, num_sms)
    return FFNBlocks(gate_up, replace(down, num_splits=splits))


def _token_block(num_tokens: int) -> int:
    """16 is the least that tensor cores multiply; rows beyond the segment's tokens cost no memory traffic."""
    return next((tokens for tokens in (16, 32, 64) if num_tokens <= tokens), 128)


def _gate_up(tokens: int, num_neurons: int, num_sms: int) -> GateUpBlocks:
    # All programs of a decode must be resident at once: a second wave would stream with most of the chip idle. So wide
    # sets take blocks twice as large, and up to 64 tokens two programs fit on a multiprocessor. In flight are 32 KiB of
    # weights a program and more; memory needs some 20 to 40 KiB a multiprocessor (3.35 TB/s at 0.8 to 1.5 us, over
    # 132). Rows of 128 values are reads of 256 bytes.
    wide = num_neurons > 64 * num_sms
    if tokens <= 32:
        num_stages = 4 if tokens == 16 else 3
        return GateUpBlocks(tokens, neurons=64 if wide else 32, hidden=128, num_warps=4, num_stages=num_stages)
    # More tokens read the activations as often as there are blocks of neurons (from L2): wider blocks halve that.
    if tokens == 64:
        return GateUpBlocks(tokens, neurons=64, hidden=64, num_warps=4, num_stages=4)
    return GateUpBlocks(tokens, neurons=128 if wide else 64, hidden=64, num_warps=8, num_stages=4)


def _down(tokens: int) -> DownBlocks:
    # 16 KiB a stage either way: narrow blocks of outputs need fewer splits, wide ones read the activations less often.
    neurons, hidden = (128, 64) if tokens <= 32 else (64, 128)
    return DownBlocks(tokens, neurons, hidden, 1, num_warps=8 if tokens == 128 else 4, num_stages=4)


def _num_splits(
    blocks: DownBlocks, num_tokens: int, num_neurons: int, hidden_size: int, itemsize: int, num_sms: int
) -> int:
    """The fewest that give (nearly) every multiprocessor a program, a power of two."""
    # A split writes and reads float32 sums of all outputs: 8 bytes a token and column, against `itemsize` a neuron and
    # column of weights. Splitting stops where that would pass half of the weights' bytes, or leave a split no rows.
    affordable = num_neurons * itemsize // (16 * num_tokens)
    most = min(_MAX_SPLITS, max(1, affordable), -(-num_neurons // blocks.neurons))
    tiles = -(-num_tokens // blocks.tokens) * -(-hidden_size // blocks.hidden)
    # Two programs are resident on a multiprocessor, of 128 tokens one; a decode can afford the second, which fills the
    # first one's pauses.
    wanted = num_sms if blocks.tokens <= 32 else 0.9 * num_sms
    resident = num_sms if blocks.tokens == 128 else 2 * num_sms
    splits = 1
    while 2 * splits <= most and tiles * splits < wanted and 2 * tiles * splits <= resident:
        splits *= 2
    return splits
