"""Repetition, presence and frequency penalties, for all sequences of a step in one gather and one scatter."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows

import numpy as np
import torch

from masquerade_engine.sequence import Sequence


class History:
    """The distinct tokens of one sequence, and how often each of them was written."""

    def __init__(self, sequence: Sequence) -> None:
        self.token_ids = array("q")
        self.times = array("f")  # in the output; 0 for what only the prompt holds
        self._sequence = sequence
        self._place: dict[int, int] = {}  # of a token id in the arrays
        self._num_counted = 0

    def update(self) -> None:
        """Count the tokens that have come since."""
        tokens, num_prompt = self._sequence.tokens, self._sequence.num_prompt
        for position in range(self._num_counted, len(tokens)):
            place = self._place.setdefault(tokens[position], len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(tokens[position])
                self.times.append(0.0)
            if position >= num_prompt:
                self.times[place] += 1.0
        self._num_counted = len(tokens)


class Histories:
    """Histories kept from step to step, so that each token is counted once.

    What a step does without is dropped.
    """

    def __init__(self) -> None:
        self._kept: dict[int, History] = {}  # by the sequence's id(): a history keeps its sequence alive

    def of(self, sequences: Rows[Sequence]) -> list[History]:
        """The histories of the sequences, up to date."""
        self._kept = {id(one): self._kept.get(id(one)) or History(one) for one in sequences}
        for history in self._kept.values():
            history.update()
        return [self._kept[id(one)] for one in sequences]


def penalise(scores: torch.Tensor, sequences: Rows[Sequence], histories: Histories) -> None:
    """Apply the penalties of each sequence to its row of float32 `[num_sequences, vocab]`, in place.

    A positive score is divided by the repetition penalty and a negative one multiplied (CTRL, section 4.1); presence
    and frequency are subtracted, as OpenAI has it.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.penalised]
    if not rows:
        return
    found = histories.of([sequences[row] for row in rows])
    sizes = [len(history.token_ids) for history in found]
    sampling = [sequences[row].sampling for row in rows]
    # One entry for each distinct token of each row.
    token_ids = np.concatenate([np.frombuffer(history.token_ids, np.int64) for history in found])
    times = np.concatenate([np.frombuffer(history.times, np.float32) for history in found])
    repetition = np.repeat(np.array([one.repetition_penalty for one in sampling], np.float32), sizes)
    presence = np.repeat(np.array([one.presence_penalty for one in sampling], np.float32), sizes)
    frequency = np.repeat(np.array([one.frequency_penalty for one in sampling], np.float32), sizes)
    index = np.repeat(np.array(rows, np.int64) * scores.shape[1], sizes) + token_ids
    lowered = presence * (times > 0) + frequency * times

    device = scores.device
    flat, where = scores.view(-1), torch.from_numpy(index).to(device)
    values, factor = flat[where], torch.from_numpy(repetition).to(device)
    values = torch.where(values > 0, values / factor, values * factor) - torch.from_numpy(lowered).to(device)
    flat[where] = values
