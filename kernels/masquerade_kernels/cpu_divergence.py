"""The loop behind `divergence`: two rows of logits, read as they are stored."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numba import carray, prange

from masquerade_kernels.cpu_rows import over_rows
from masquerade_kernels.cpu_values import Loop, exp, load, pointer, stored_as

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


@functools.cache
def divergence_loop(bits: int, num_threads: int) -> Loop:
    """The loop for logits of 16 (bf16) or 32 (float32) bits; arguments as at its namesake below."""
    (loop,) = over_rows((_divergence,), bits, num_threads)
    return loop


def _divergence(dtype: DTypeLike) -> Loop:
    def divergence(
        num_rows: int,
        vocabulary: int,
        target_at: int,
        predicted_at: int,  # the gradient takes their place
        tops_at: int,  # float32 [2, num_rows]: the highest of each row of both
        kl_at: int,  # float32 [num_rows]
        places_at: int,  # int32 [2, num_rows]: where these are, the first of several; written without weights
        weights_at: int,  # float32 [num_rows], or 0
    ) -> None:
        """KL(target ‖ predicted) of each row; under weights also w · (softmax(predicted) - softmax(target))."""
        targets = carray(pointer(target_at), (num_rows, vocabulary), dtype)
        predictions = carray(pointer(predicted_at), (num_rows, vocabulary), dtype)
        tops = carray(pointer(tops_at), (2, num_rows), np.float32)
        # Of two dimensions: on several threads numba 0.68 loses what is written to a 1-d array by the loop's index.
        kl = carray(pointer(kl_at), (num_rows, 1), np.float32)
        places = carray(pointer(places_at), (2, num_rows), np.int32)
        weights = carray(pointer(weights_at), (num_rows,), np.float32)
        for i in prange(num_rows):
            target_top, predicted_top = tops[0, i], tops[1, i]
            of_target, of_predicted, between = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for d in range(vocabulary):
                wanted, given = load(targets[i, d]) - target_top, load(predictions[i, d]) - predicted_top
                share = exp(wanted)
                of_target += share
                of_predicted += exp(given)
                between += share * (wanted - given)
            kl[i, 0] = between / of_target + np.log(of_predicted / of_target)
            if weights_at == 0:
                place = 0
                while place < vocabulary - 1 and load(targets[i, place]) != target_top:
                    place += 1
                places[0, i] = place
                place = 0
                while place < vocabulary - 1 and load(predictions[i, place]) != predicted_top:
                    place += 1
                places[1, i] = place
            else:
                target_scale, predicted_scale = weights[i] / of_target, weights[i] / of_predicted
                for d in range(vocabulary):
                    likely = exp(load(predictions[i, d]) - predicted_top) * predicted_scale
                    value = likely - exp(load(targets[i, d]) - target_top) * target_scale
                    predictions[i, d] = stored_as(value, predictions[i, d])

    return divergence
