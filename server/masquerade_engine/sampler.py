"""From logits to tokens, for all sequences of a step at once.

A token is drawn by inverting a cumulative distribution at one number from the request's own stream, so neighbours in
the batch change nothing. Where tokens must be sorted for a bound, only the likeliest are; the rest is looked at where
the bound reaches beyond them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from masquerade_engine.sequence import SampledToken, Sequence

# Likeliest tokens that are sorted. On 16 x 49152 float32 logits, one thread: top-256 2.3 ms, a full sort 56 ms.
_PREFILTER = 256
_BLOCK = 64  # tokens whose probabilities are summed before the running sum: near the root of the vocabulary


def sample(logits: torch.Tensor, sequences: Rows[Sequence], stop_token_ids: frozenset[int]) -> list[SampledToken]:
    """One token for each sequence from its row of `logits` `[num_sequences, vocab]`.

    In order: `min_tokens` bars the stop tokens, then penalties, temperature, `min_p`, `top_k`, `top_p` (vLLM's order).
    """
    logits = logits.float()
    reports = _Reports(logits, sequences)
    logits = _edited(logits, sequences, stop_token_ids)
    return reports.of(_chosen(logits, sequences))


def _chosen(logits: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Int64 `[num_sequences]`: the likeliest token of greedy rows, a drawn one of the others."""
    drawing = [row for row, sequence in enumerate(sequences) if not sequence.sampling.greedy]
    if not drawing:
        return logits.argmax(dim=-1)
    bounds = _Bounds.of([sequences[row] for row in drawing], logits.device)
    if len(drawing) == len(sequences):
        return _draw(logits, bounds)
    tokens = logits.argmax(dim=-1)
    rows = torch.tensor(drawing, device=logits.device)
    tokens[rows] = _draw(logits[rows], bounds)
    return tokens


class _Reports:
    """Log-probabilities of the raw distribution, for the rows that asked."""

    def __init__(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
        self._wanted = {
            row: sequence.sampling.logprobs
            for row, sequence in enumerate(sequences)
            if sequence.sampling.logprobs is not None
        }
        if self._wanted:
            self._logprobs = logits[list(self._wanted)].log_softmax(dim=-1)  # [num_wanted, vocab]

    def of(self, tokens: torch.Tensor) -> list[SampledToken]:
        sampled = [SampledToken(token) for token in tokens.tolist()]
        for index, (row, num_top) in enumerate(self._wanted.items()):
            logprobs = self._logprobs[index]
            top = logprobs.topk(min(num_top, logprobs.shape[0]))
            sampled[row] = SampledToken(
                sampled[row].token_id,
                float(logprobs[sampled[row].token_id]),
                tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
            )
        return sampled


def _edited(logits: torch.Tensor, sequences: Rows[Sequence], stop_token_ids: frozenset[int]) -> torch.Tensor:
    """Logits after the stop bar and the penalties; the same tensor where there are none."""
    barred = [row for row, s in enumerate(sequences) if s.num_output < s.sampling.min_tokens]
    penalised = [row for row, s in enumerate(sequences) if s.sampling.penalised]
    if not barred and not penalised:
        return logits
    logits = logits.clone()
    for row in penalised:
        _penalise(logits[row], sequences[row])
    if barred and stop_token_ids:
        stops = torch.tensor(sorted(stop_token_ids), device=logits.device)
        logits[torch.tensor(barred, device=logits.device)[:, None], stops] = -torch.inf
    return logits


def _penalise(logits: torch.Tensor, sequence: Sequence) -> None:
    """Apply one sequence's penalties to its row `[vocab]`, in place."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = Counter(sequence.tokens[sequence.num_prompt :])
    if counts:
        output = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[output] -= sampling.presence_penalty + sampling.frequency_penalty * times


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What each row allows, `[num_rows]` each."""

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor  # int64, 0: no bound
    top_p: torch.Tensor
    draw: torch.Tensor  # float64, uniform in [0, 1)

    @classmethod
    def of(cls, sequences: Rows[Sequence], device: torch.device) -> _Bounds:
        parameters = [sequence.sampling for sequence in sequences]
        return cls(
            torch.tensor([max(p.temperature, 1e-4) for p in parameters], device=device),
            torch.tensor([p.min_p for p in parameters], device=device),
            torch.tensor([p.top_k for p in parameters], device=device),
            torch.tensor([p.top_p for p in parameters], device=device),
            torch.tensor([s.draws.random() for s in sequences], dtype=torch.float64, device=device),
        )

    def rows(self, which: torch.Tensor | slice) -> _Bounds:
        return _Bounds(
            self.temperature[which], self.min_p[which], self.top_k[which], self.top_p[which], self.draw[which]
        )


def _draw(logits: torch.Tensor, bounds: _Bounds) -> torch.Tensor:
    """A token for each row of `[num_rows, vocab]`: int64 `[num_rows]`."""
    probs = (logits / bounds.temperature[:, None]).softmax(dim=-1)
    bounded = (bounds.min_p > 0) | (bounds.top_k > 0) | (bounds.top_p < 1)
    if not bounded.any():
        return _draw_plain(probs, bounds.draw)
    if bounded.all():
        return _draw_bounded(probs, bounds)
    tokens = torch.empty_like(bounds.top_k)
    tokens[~bounded] = _draw_plain(probs[~bounded], bounds.draw[~bounded])
    tokens[bounded] = _draw_bounded(probs[bounded], bounds.rows(bounded))
    return tokens


def _draw_plain(probs: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Invert the running sum of `[num_rows, vocab]` in vocabulary order: first among blocks, then within one."""
    padding = -probs.shape[1] % _BLOCK
    blocks = (F.pad(probs, (0, padding)) if padding else probs).view(len(probs), -1, _BLOCK)
    mass = blocks.sum(dim=-1).double()  # [num_rows, num_blocks]
    sums = mass.cumsum(dim=-1)
    target = draw * sums[:, -1]
    block = _first_above(sums, target)
    target = target - _at(sums - mass, block)
    within = blocks[torch.arange(len(blocks), device=blocks.device), block].cumsum(dim=-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(within, target)


def _draw_bounded(probs: torch.Tensor, bounds: _Bounds) -> torch.Tensor:
    """Draw among the tokens that `min_p`, then `top_k`, then `top_p` keep, in falling order of probability.

    Every bound keeps a prefix in that order. Rows whose prefix does not end among the likeliest `_PREFILTER` are drawn
    again from all tokens that a bound could keep.
    """
    width = min(_PREFILTER, probs.shape[1])
    likeliest, token_ids = probs.topk(width, dim=-1)
    rank, settled = _bounded_rank(likeliest, bounds, whole=width == probs.shape[1])
    tokens = _at(token_ids, rank)
    for row in (~settled).nonzero()[:, 0].tolist():
        at = slice(row, row + 1)
        possible = (probs[row] >= _least_kept(probs[row], bounds, row)).nonzero()[:, 0]
        falling, order = probs[row, possible].sort(descending=True)
        tokens[at] = possible[order[_bounded_rank(falling[None], bounds.rows(at), whole=True)[0]]]
    return tokens


def _bounded_rank(falling: torch.Tensor, bounds: _Bounds, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of the drawn token in `[num_rows, width]` probabilities, and whether it is certain.

    It is, where `falling` is `whole` (holds all that the bounds could keep) or the bounds end within it.
    """
    width = falling.shape[1]
    sums = falling.cumsum(dim=-1, dtype=torch.float64)
    # 1. min_p, then top_k: how many tokens they keep, and whether that is known.
    kept = (falling >= bounds.min_p[:, None] * falling[:, :1]).sum(dim=-1)
    certain = (kept < width) | whole
    ended = (bounds.top_k > 0) & (bounds.top_k <= width)
    kept = torch.where(ended, torch.minimum(kept, bounds.top_k), kept)
    certain |= ended
    # 2. Their mass: known as well where they keep everything.
    everything = (bounds.min_p == 0) & (bounds.top_k == 0)
    mass = torch.where(everything, 1.0, _at(sums, kept - 1))
    # 3. top_p: the fewest tokens that reach its share of the mass.
    nucleus = ((sums - falling) < (bounds.top_p * mass)[:, None]).sum(dim=-1).clamp(min=1)
    kept = torch.where(bounds.top_p < 1, torch.minimum(kept, nucleus), kept)
    certain |= everything & (nucleus < width)
    # 4. The draw, among what is kept.
    rank = _first_above(sums, bounds.draw * _at(sums, kept - 1))
    return torch.minimum(rank, kept - 1), certain


def _least_kept(probs: torch.Tensor, bounds: _Bounds, row: int) -> torch.Tensor:
    """A probability below which no token of `[vocab]` is kept.

    For `top_p` alone: the tokens below (1 - top_p) / vocab hold less than 1 - top_p together.
    """
    floor = bounds.min_p[row] * probs.max()
    alone = bool((bounds.min_p[row] == 0) & (bounds.top_k[row] == 0))
    return (1 - bounds.top_p[row]) / probs.numel() if alone else floor


def _first_above(rising: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index of each row's running sum that is above the target, at most that of the last increase."""
    last = (rising < rising[:, -1:]).sum(dim=-1)
    return torch.minimum((rising <= target[:, None]).sum(dim=-1), last)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index[:, None])[:, 0]
