"""Other ways to a gradient in the scores of a top-k mask, beside the straight-through one."""

from __future__ import annotations

from typing import Any, Literal

import torch

from masquerade_pruner.mask_learning import MaskLearner, straight_through, top_k_mask

Estimator = Literal["straight-through", "gumbel", "soft"]
Optimizer = Literal["damped", "adam"]

COOLING = 0.1  # temperatures end at this share of where they start
ANNEALED_SHARE = 0.5  # of the steps, over which an annealed sparsity grows


class EstimatorLearner(MaskLearner):
    """A mask learner whose steps estimate, or size, the mask in another way; what it yields is a hard top-k mask.

    - `gumbel`: top-k of scores with Gumbel noise, whose gradient is that of `soft_top_k` of the same (straight-through
      Gumbel-softmax, arXiv 1611.01144, over subsets as in arXiv 1901.10517);
    - `soft`: the forward pass is `soft_top_k` itself, without noise;
    - `annealed`: dropped neurons grow from none to all that are dropped over the first half of the steps, by the cubic
      schedule of arXiv 1710.01878;
    - `adam`: every score has a second moment of its own (torch's Adam);
    - `averaged` False: the mask is that of the last step's scores.

    Noise is drawn by step number, so a restored learner goes on the same.
    """

    def __init__(
        self,
        *args: Any,
        estimator: Estimator = "straight-through",
        temperature: float = 0.0,  # in units of the scores, of `gumbel` and `soft`
        annealed: bool = False,
        optimizer: Optimizer = "damped",
        averaged: bool = True,
        seed: int = 0,
        **named: Any,
    ) -> None:
        super().__init__(*args, **named)
        self._estimator = estimator
        self._temperature = temperature
        self._annealed = annealed
        self._averaged = averaged
        if optimizer == "adam":
            self._optimizer = torch.optim.Adam([self.scores], lr=self._learning_rate)
        self._seed = seed

    def averaged(self) -> torch.Tensor:
        return super().averaged() if self._averaged else self.scores.detach().clone()

    def training_mask(self) -> torch.Tensor:
        kept = self.kept_now()
        scores = self.scores + self._pull
        if self._estimator == "straight-through":
            return straight_through(scores, kept)
        temperature = self._temperature * COOLING ** (self.step_number / max(1, self._steps - 1))
        if self._estimator == "soft":
            return soft_top_k(scores, kept, temperature)
        noisy = scores + temperature * self._gumbel()
        soft = soft_top_k(noisy, kept, temperature)
        return top_k_mask(noisy.detach(), kept) + soft - soft.detach()

    def kept_now(self) -> int:
        """Neurons of every layer that this step keeps."""
        if not self._annealed:
            return self._kept
        done = min(1.0, self.step_number / max(1.0, ANNEALED_SHARE * self._steps))
        return self._kept + round((self.scores.shape[1] - self._kept) * (1 - done) ** 3)

    def _gumbel(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self.step_number)
        uniform = torch.rand(self.scores.shape, generator=generator).clamp_(1e-9, 1 - 1e-6)
        return -(-uniform.log()).log()


def soft_top_k(scores: torch.Tensor, kept: int, temperature: float) -> torch.Tensor:
    """sigmoid((z - t) / temperature) in every layer, with t such that a layer's values sum to `kept`; differentiable.

    t is found by bisection; one Newton step with detached slopes then carries its dependence on z into the gradient.
    """
    if kept == scores.shape[1]:
        return torch.ones_like(scores) + 0 * scores
    with torch.no_grad():
        low = scores.amin(dim=1, keepdim=True) - 40 * temperature
        high = scores.amax(dim=1, keepdim=True) + 40 * temperature
        for _ in range(60):
            middle = (low + high) / 2
            above = torch.sigmoid((scores - middle) / temperature).sum(dim=1, keepdim=True) > kept
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        threshold = (low + high) / 2
        found = torch.sigmoid((scores - threshold) / temperature)
        slope = (found * (1 - found)).sum(dim=1, keepdim=True).clamp_min(1e-12) / temperature
    excess = torch.sigmoid((scores - threshold) / temperature).sum(dim=1, keepdim=True) - kept
    return torch.sigmoid((scores - threshold - excess / slope) / temperature)
