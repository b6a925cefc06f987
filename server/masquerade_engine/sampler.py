"""From logits to tokens, for all sequences of a step at once.

A token is drawn by inverting a cumulative distribution at one number from the request's own stream, so neighbours in
the batch change nothing. Under a bound tokens are drawn in falling order of probability: on the CPU in a compiled loop
that sorts next to none of them; elsewhere the likeliest are sorted, and the rest where the bound reaches beyond them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from masquerade_engine.penalties import Histories, penalise
from masquerade_engine.requests import SamplingParams
from masquerade_engine.sequence import SampledToken, Sequence
from masquerade_kernels.cpu_sampling import BLOCK as _BLOCK
from masquerade_kernels.cpu_sampling import sampling_loop

_PREFILTER = 256  # likeliest tokens that are sorted for every row with a bound


class Sampler:
    """Samples step after step, and keeps what it needs for that: two buffers of float32 rows, and token histories.

    To allocate the buffers anew with each step took longer than all else: 3 MB are 768 page faults.
    """

    def __init__(self, stop_token_ids: frozenset[int]) -> None:
        self._stop_token_ids = stop_token_ids
        self._histories = Histories()
        self._scores = self._probs = torch.empty(0, 0)  # [most rows so far, vocab rounded up to whole blocks]

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[SampledToken]:
        """One token for each sequence from its row of `logits` `[num_sequences, vocab]`, which stay as they are.

        In order: penalties, then `min_tokens` bars the stop tokens, temperature, `min_p`, `top_k`, `top_p` (vLLM's).
        """
        num_rows, vocab = logits.shape
        self._make_room(num_rows, -(-vocab // _BLOCK) * _BLOCK, logits.device)
        scores = self._scores[:num_rows]
        scores[:, :vocab] = logits
        reports = _Reports(scores, sequences, vocab)
        penalise(scores, sequences, self._histories)
        _bar_stops(scores, sequences, self._stop_token_ids)
        return reports.of(self._chosen(scores, sequences))

    def _make_room(self, num_rows: int, width: int, device: torch.device) -> None:
        kept_rows, kept_width = self._scores.shape
        if num_rows > kept_rows or width != kept_width or device != self._scores.device:
            # What rounds the vocabulary up is never likely.
            self._scores = torch.full((max(num_rows, kept_rows), width), -torch.inf, device=device)
            self._probs = torch.empty_like(self._scores)

    def _chosen(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Int64 `[num_sequences]`: the likeliest token of greedy rows, a drawn one of the others."""
        greedy = [row for row, one in enumerate(sequences) if one.sampling.greedy]
        if len(greedy) == len(sequences):
            return scores.argmax(dim=-1)
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=scores.device)
        if greedy:
            which = torch.tensor(greedy, device=scores.device)
            tokens[which] = scores[which].argmax(dim=-1)
        for draw, rows in _rows_by_draw(sequences).items():
            if draw is _draw_bounded and _has_loops(scores.device):
                tokens[rows] = _drawn_in_loop(scores, rows, [sequences[row] for row in rows], self._probs)
                continue
            drawing = _Drawing.of([sequences[row] for row in rows], scores.device)
            which = torch.tensor(rows, device=scores.device)
            tokens[which] = draw(self._probabilities(scores, which, drawing.temperature), drawing)
        return tokens

    def _probabilities(self, scores: torch.Tensor, which: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """Of the rows `which`, in the buffer of probabilities; the scores of a step where all draw are changed."""
        probs = self._probs[: len(which)]
        chosen = scores if len(which) == len(scores) else torch.index_select(scores, 0, which, out=probs)
        return torch.softmax(chosen.div_(temperature[:, None]), dim=-1, out=probs)


def _bar_stops(scores: torch.Tensor, sequences: Rows[Sequence], stop_token_ids: frozenset[int]) -> None:
    """No stop token for a sequence that has not its `min_tokens` yet; in place."""
    barred = [row for row, one in enumerate(sequences) if one.num_output < one.sampling.min_tokens]
    if barred and stop_token_ids:
        stops = torch.tensor(sorted(stop_token_ids), device=scores.device)
        scores[torch.tensor(barred, device=scores.device)[:, None], stops] = -torch.inf


class _Reports:
    """Log-probabilities of the raw distribution, for the rows that asked."""

    def __init__(self, scores: torch.Tensor, sequences: Rows[Sequence], vocab: int) -> None:
        """`scores` before they are edited."""
        self._num_top = {
            row: one.sampling.logprobs for row, one in enumerate(sequences) if one.sampling.logprobs is not None
        }
        if not self._num_top:
            return
        rows = list(self._num_top)
        self._logprobs = (scores if len(rows) == len(sequences) else scores[rows]).log_softmax(dim=-1)
        self._top = _likeliest(self._logprobs, min(max(self._num_top.values()), vocab))

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


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What each row that draws allows, and its draw; `[num_rows]` each."""

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

    def least_kept(self, greatest: torch.Tensor, vocab: int) -> torch.Tensor:
        """A probability for each row below which no token is kept; `greatest` is its likeliest token's.

        For `top_p` alone: the tokens below (1 - top_p) / vocab hold less than 1 - top_p together.
        """
        return torch.where(self.top_p_alone, (1 - self.top_p) / vocab, self.min_p * greatest)


def _has_loops(device: torch.device) -> bool:
    return device.type == "cpu"


def _drawn_in_loop(
    scores: torch.Tensor, rows: Rows[int], sequences: Rows[Sequence], room: torch.Tensor
) -> torch.Tensor:
    """Bounded draws of some rows of float32 `[num_rows, vocab]`, as `_draw_bounded` makes them; `room` is as large."""
    parameters = [one.sampling for one in sequences]
    bounds = np.array(
        [
            (max(p.temperature, 1e-4), p.min_p, p.top_k, p.top_p, sequence.draws.random())
            for p, sequence in zip(parameters, sequences, strict=True)
        ]
    )
    which, tokens = np.array(rows), np.empty(len(rows), np.int64)
    draw = sampling_loop(torch.get_num_threads())
    at = (scores.data_ptr(), which.ctypes.data, room.data_ptr(), bounds.ctypes.data, tokens.ctypes.data)
    draw(len(rows), scores.shape[1], *at)
    return torch.from_numpy(tokens)


_Draw = Callable[[torch.Tensor, _Drawing], torch.Tensor]  # probabilities `[num_rows, width]` to tokens `[num_rows]`


def _rows_by_draw(sequences: Rows[Sequence]) -> dict[_Draw, list[int]]:
    """The rows that draw, by how."""
    rows: dict[_Draw, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if not sequence.sampling.greedy:
            rows.setdefault(_draw_bounded if _is_bounded(sequence.sampling) else _draw_plain, []).append(row)
    return rows


def _is_bounded(sampling: SamplingParams) -> bool:
    return sampling.min_p > 0 or sampling.top_k > 0 or sampling.top_p < 1


def _draw_plain(probs: torch.Tensor, drawing: _Drawing) -> torch.Tensor:
    """Invert the running sum in vocabulary order: first among blocks, then within one."""
    blocks = probs.view(len(probs), -1, _BLOCK)
    mass = blocks.sum(dim=-1).double()  # [num_rows, num_blocks]
    sums = mass.cumsum(dim=-1)
    target = drawing.draw * sums[:, -1]
    block = _first_above(sums, target)
    target = target - _at(sums - mass, block)
    within = blocks[torch.arange(len(blocks), device=blocks.device), block].cumsum(dim=-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(within, target)


def _draw_bounded(probs: torch.Tensor, drawing: _Drawing) -> torch.Tensor:
    """Draw among the tokens that `min_p`, then `top_k`, then `top_p` keep, in falling order of probability.

    Every bound keeps a prefix in that order. Rows whose prefix does not end among the likeliest `_PREFILTER` are drawn
    again, from all tokens that a bound could keep.
    """
    vocab = probs.shape[1]
    likeliest, token_ids = _likeliest(probs, min(_PREFILTER, vocab))
    rank, certain = _bounded_rank(likeliest, drawing, whole=likeliest.shape == probs.shape)
    tokens = _at(token_ids, rank)
    if not certain.all():
        rest = (~certain).nonzero()[:, 0]
        least = drawing.least_kept(likeliest[:, 0], vocab)
        possible = [(probs[row] >= least[row]).nonzero()[:, 0] for row in rest.tolist()]
        weights = [probs[row].index_select(0, ids) for row, ids in zip(rest.tolist(), possible, strict=True)]
        weighed = pad_sequence(weights, batch_first=True)  # the shorter ones end in tokens that are never drawn
        falling, place = _greatest(weighed, weighed.shape[1])
        rank, _ = _bounded_rank(falling, drawing.rows(rest), whole=True)
        for row, ids, index in zip(rest.tolist(), possible, _at(place, rank).tolist(), strict=True):
            tokens[row] = ids[index]
    return tokens


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
    num_rows, width = scores.shape
    num_blocks = width // _BLOCK
    if scores.device.type != "cpu" or not 0 < 2 * count <= num_blocks:
        return _greatest(scores, count)
    _, best = _greatest(scores.view(num_rows, num_blocks, _BLOCK).amax(dim=-1), count)  # [num_rows, count]
    block_of_all = (num_blocks * torch.arange(num_rows)[:, None] + best).flatten()
    found = scores.view(-1, _BLOCK).index_select(0, block_of_all).view(num_rows, count * _BLOCK)
    values, place = _greatest(found, count)
    return values, _BLOCK * best.gather(1, place // _BLOCK) + place % _BLOCK


def _greatest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk` of float32 `[num_rows, width]`: values and places in falling order, of equal values the first place first.

    On the CPU numpy partitions and sorts integers that hold a value above its place, with vector instructions: the
    greatest 256 of 16 x 8192 took 0.3 ms and `topk` 1.0, on one thread.
    """
    if values.device.type != "cpu" or count == 0:
        top = values.topk(count, dim=-1)
        return top.values, top.indices
    width = values.shape[1]
    bits = values.contiguous().view(torch.int32)
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # rises with the value, below zero as well
    keys = rising.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(width - 1, -1, -1)).numpy()
    if count < width:
        keys.partition(width - count, axis=-1)
        keys = keys[:, width - count :]
    keys.sort(axis=-1)
    place = width - 1 - torch.from_numpy(keys[:, ::-1] & 0xFFFFFFFF)
    return values.gather(1, place), place


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index of each row's running sum that is above the target, at most that of the last increase."""
    last = (rising < rising[:, -1:]).sum(dim=-1)
    return torch.minimum((rising <= target[:, None]).sum(dim=-1), last)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index[:, None])[:, 0]
