"""From logits to tokens, for all sequences of a step at once.

A token is drawn by inverting a cumulative distribution at one number from the request's own stream, so neighbours in
the batch change nothing. Where tokens must be sorted for a bound, only the likeliest are; the rest is looked at where
the bound reaches beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from masquerade_engine.penalties import Histories, penalise
from masquerade_engine.requests import SamplingParams
from masquerade_engine.sequence import SampledToken, Sequence

_PREFILTER = 256  # likeliest tokens that are sorted for every row with a bound; for a row that needs more,
_WIDER = 16  # times as many
# Tokens that are passed over together. The maxima of 16 x 49152 scores took 1.2 ms in blocks of 16, 0.15 of 32 and 0.09
# of 64 (one thread), and the smaller the blocks, the fewer tokens are left to sort.
_BLOCK = 32


def sample(
    logits: torch.Tensor,
    sequences: Rows[Sequence],
    stop_token_ids: frozenset[int],
    histories: Histories | None = None,
) -> list[SampledToken]:
    """One token for each sequence from its row of `logits` `[num_sequences, vocab]`, which stay as they are.

    In order: penalties, then `min_tokens` bars the stop tokens, temperature, `min_p`, `top_k`, `top_p` (vLLM's order).
    With `histories` of the caller's, penalties count each token once and not in every step.
    """
    scores = logits.to(torch.float32, copy=True)  # a step's own, to be changed in place
    reports = _Reports(scores, sequences)
    penalise(scores, sequences, histories or Histories())
    _bar_stops(scores, sequences, stop_token_ids)
    return reports.of(_chosen(scores, sequences))


def _bar_stops(scores: torch.Tensor, sequences: Rows[Sequence], stop_token_ids: frozenset[int]) -> None:
    """No stop token for a sequence that has not its `min_tokens` yet."""
    barred = [row for row, one in enumerate(sequences) if one.num_output < one.sampling.min_tokens]
    if barred and stop_token_ids:
        stops = torch.tensor(sorted(stop_token_ids), device=scores.device)
        scores[torch.tensor(barred, device=scores.device)[:, None], stops] = -torch.inf


class _Reports:
    """Log-probabilities of the raw distribution, for the rows that asked."""

    def __init__(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> None:
        """`scores` `[num_sequences, vocab]` before they are edited."""
        self._num_top = {
            row: one.sampling.logprobs for row, one in enumerate(sequences) if one.sampling.logprobs is not None
        }
        if not self._num_top:
            return
        rows = list(self._num_top)
        self._logprobs = (scores if len(rows) == len(sequences) else scores[rows]).log_softmax(dim=-1)
        self._top = _likeliest(self._logprobs, min(max(self._num_top.values()), scores.shape[1]))

    def of(self, tokens: torch.Tensor) -> list[SampledToken]:
        """The sampled tokens `[num_sequences]` with what was asked to be told of each."""
        sampled = [SampledToken(token) for token in tokens.tolist()]
        if not self._num_top:
            return sampled
        logprobs = _at(self._logprobs, tokens[list(self._num_top)]).tolist()  # [num_wanted]
        top_logprobs, top_ids = (values.tolist() for values in self._top)  # [num_wanted, most]
        for index, (row, num_top) in enumerate(self._num_top.items()):
            top = tuple(zip(top_ids[index][:num_top], top_logprobs[index][:num_top], strict=True))
            sampled[row] = SampledToken(sampled[row].token_id, logprobs[index], top)
        return sampled


def _chosen(scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Int64 `[num_sequences]`: the likeliest token of greedy rows, a drawn one of the others."""
    rows_of: dict[_Pick, list[int]] = {}
    for row, sequence in enumerate(sequences):
        rows_of.setdefault(_pick_of(sequence.sampling), []).append(row)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=scores.device)
    for pick, rows in rows_of.items():
        if len(rows) == len(sequences):
            return pick(scores, sequences)
        which = torch.tensor(rows, device=scores.device)
        tokens[which] = pick(scores[which], [sequences[row] for row in rows])
    return tokens


# Scores `[num_rows, vocab]`, which it may change, to tokens `[num_rows]`.
_Pick = Callable[[torch.Tensor, Rows[Sequence]], torch.Tensor]


def _pick_of(sampling: SamplingParams) -> _Pick:
    if sampling.greedy:
        return _greedy
    return _bounded if sampling.min_p > 0 or sampling.top_k > 0 or sampling.top_p < 1 else _plain


def _greedy(scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    return scores.argmax(dim=-1)


def _plain(scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Invert the running sum of the probabilities in vocabulary order: first among blocks, then within one."""
    drawing = _Drawing.of(sequences, scores.device)
    probs = scores.div_(drawing.temperature[:, None]).softmax(dim=-1)
    padding = -probs.shape[1] % _BLOCK
    blocks = (F.pad(probs, (0, padding)) if padding else probs).view(len(probs), -1, _BLOCK)
    mass = blocks.sum(dim=-1).double()  # [num_rows, num_blocks]
    sums = mass.cumsum(dim=-1)
    target = drawing.draw * sums[:, -1]
    block = _first_above(sums, target)
    target = target - _at(sums - mass, block)
    within = blocks[torch.arange(len(blocks), device=blocks.device), block].cumsum(dim=-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(within, target)


def _bounded(scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Draw among the tokens that `min_p`, then `top_k`, then `top_p` keep, in falling order of probability."""
    drawing = _Drawing.of(sequences, scores.device)
    probs = scores.div_(drawing.temperature[:, None]).softmax(dim=-1)
    return _among_likeliest(probs, drawing, _PREFILTER)


def _among_likeliest(probs: torch.Tensor, drawing: _Drawing, width: int) -> torch.Tensor:
    """Int64 `[num_rows]`: the drawn tokens, looked for among the likeliest `width`.

    Every bound keeps a prefix in falling order. Rows whose prefix does not end there are drawn again among more.
    """
    vocab = probs.shape[1]
    falling, token_ids = _likeliest(probs, min(width, vocab))
    rank, certain = _bounded_rank(falling, drawing, whole=width >= vocab)
    tokens = _at(token_ids, rank)
    if not certain.all():
        rest = ~certain
        tokens[rest] = _among_likeliest(probs[rest], drawing.rows(rest), _WIDER * width)
    return tokens


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What each row allows, and its draw; `[num_rows]` each."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor  # int64, 0: no bound
    top_p: torch.Tensor
    draw: torch.Tensor  # float64, uniform in [0, 1)

    @classmethod
    def of(cls, sequences: Rows[Sequence], device: torch.device) -> _Drawing:
        """Takes the next number of every sequence's own stream."""
        parameters = [sequence.sampling for sequence in sequences]
        return cls(
            torch.tensor([max(p.temperature, 1e-4) for p in parameters], device=device),
            torch.tensor([p.min_p for p in parameters], device=device),
            torch.tensor([p.top_k for p in parameters], device=device),
            torch.tensor([p.top_p for p in parameters], device=device),
            torch.tensor([s.draws.random() for s in sequences], dtype=torch.float64, device=device),
        )

    def rows(self, which: torch.Tensor) -> _Drawing:
        """Some of the rows."""
        return _Drawing(
            self.temperature[which], self.min_p[which], self.top_k[which], self.top_p[which], self.draw[which]
        )

    @property
    def top_p_alone(self) -> torch.Tensor:
        """Which rows keep everything but for `top_p`."""
        return (self.min_p == 0) & (self.top_k == 0)


def _bounded_rank(falling: torch.Tensor, drawing: _Drawing, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of the drawn token in `[num_rows, width]` probabilities, and whether it is certain.

    It is, where `falling` is `whole` (holds all that the bounds could keep) or the bounds end within it.
    """
    width = falling.shape[1]
    sums = falling.cumsum(dim=-1, dtype=torch.float64)
    # 1. min_p, then top_k: how many tokens they keep, and whether that is known.
    kept = (falling >= drawing.min_p[:, None] * falling[:, :1]).sum(dim=-1)
    certain = (kept < width) | whole
    ended = (drawing.top_k > 0) & (drawing.top_k <= width)
    kept = torch.where(ended, torch.minimum(kept, drawing.top_k), kept)
    certain |= ended
    # 2. Their mass: known as well where they keep everything.
    mass = torch.where(drawing.top_p_alone, 1.0, _at(sums, kept - 1))
    # 3. top_p: the fewest tokens that reach its share of the mass.
    nucleus = ((sums - falling) < (drawing.top_p * mass)[:, None]).sum(dim=-1).clamp(min=1)
    kept = torch.where(drawing.top_p < 1, torch.minimum(kept, nucleus), kept)
    certain |= drawing.top_p_alone & (nucleus < width)
    # 4. The draw, among what is kept.
    rank = _first_above(sums, drawing.draw * _at(sums, kept - 1))
    return torch.minimum(rank, kept - 1), certain


def _likeliest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` greatest of `[num_rows, vocab]` in falling order: scores and token ids, `[num_rows, count]` each.

    They lie in the `count` blocks of the greatest maxima, so that most of the vocabulary is only passed over.
    """
    num_rows, vocab = scores.shape
    num_blocks = vocab // _BLOCK
    if scores.device.type != "cpu" or not 0 < 2 * count <= num_blocks:
        return _greatest(scores, count)
    num_tail = vocab - num_blocks * _BLOCK
    blocks = scores[:, : vocab - num_tail].reshape(num_rows, num_blocks, _BLOCK)
    _, best = _greatest(blocks.amax(dim=-1), count)  # [num_rows, count]
    row_start = num_blocks * torch.arange(num_rows)[:, None]
    found = blocks.reshape(-1, _BLOCK).index_select(0, (row_start + best).flatten()).view(num_rows, -1)
    token_ids = (_BLOCK * best[:, :, None] + torch.arange(_BLOCK)).flatten(1)  # [num_rows, count * _BLOCK]
    if num_tail:
        found = torch.cat([found, scores[:, -num_tail:]], dim=1)
        tail_ids = torch.arange(vocab - num_tail, vocab)
        token_ids = torch.cat([token_ids, tail_ids.expand(num_rows, -1)], dim=1)
    values, place = _greatest(found, count)
    return values, token_ids.gather(1, place)


def _greatest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` of float32 `[num_rows, width]`: values and places in falling order, of equal values the first place first.

    On the CPU numpy partitions and sorts integers that hold a value above its place, with vector instructions: the
    greatest 4096 of 4 x 49152 took 0.4 ms and `topk` 2.9, on one thread.
    """
    if values.device.type != "cpu" or count == 0:
        top = values.topk(count, dim=-1)
        return top.values, top.indices
    width = values.shape[1]
    bits = values.contiguous().view(torch.int32)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # an integer that rises with the value, below zero as well
    keys = ((rising.long() << 32) | torch.arange(width - 1, -1, -1)).numpy()
    if count < width:
        keys = np.partition(keys, width - count, axis=-1)[:, width - count :]
    falling = torch.from_numpy(np.sort(keys, axis=-1)[:, ::-1].copy())
    place = width - 1 - (falling & 0xFFFFFFFF)
    return values.gather(1, place), place


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index of each row's running sum that is above the target, at most that of the last increase."""
    last = (rising < rising[:, -1:]).sum(dim=-1)
    return torch.minimum((rising <= target[:, None]).sum(dim=-1), last)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index[:, None])[:, 0]
