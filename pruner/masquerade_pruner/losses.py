"""Losses over a large vocabulary, computed in row chunks so that no [tokens, vocabulary] fp32 tensor is ever held."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from masquerade_kernels.divergence import divergence, divergence_and_gradient

ROWS = 128  # rows of logits at a time: 128 x 49152 fp32 is 25 MB, which glibc recycles instead of mapping anew


class _Precomputed(torch.autograd.Function):
    """A loss whose gradient in `student` was made with it, while each chunk's logits were at hand."""

    @staticmethod
    def forward(ctx, student, loss, grad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None


def chunked_kl(
    student: torch.Tensor,  # [rows, hidden] final states, with gradient
    teacher: torch.Tensor,  # [rows, hidden] final states of the dense base
    head: torch.Tensor,  # [vocabulary, hidden]
    weights: torch.Tensor,  # [rows] fp32, summing to 1
) -> torch.Tensor:
    """Weighted sum of per-token KL(teacher ‖ student) in nats, differentiable in `student`."""
    grad, total = torch.empty_like(student), torch.zeros((), device=student.device)
    with torch.no_grad():
        for start in range(0, student.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            target, predicted = F.linear(teacher[rows], head), F.linear(student[rows], head)
            kl, of_predicted = divergence_and_gradient(target, predicted, weights[rows])
            total += (kl * weights[rows]).sum()
            grad[rows] = of_predicted @ head
    loss: torch.Tensor = _Precomputed.apply(student, total, grad)  # type: ignore[no-untyped-call]
    return loss


def chunked_cross_entropy(
    student: torch.Tensor,  # [rows, hidden] final states, with gradient
    head: torch.Tensor,  # [vocabulary, hidden]
    targets: torch.Tensor,  # [rows] token ids
    weights: torch.Tensor,  # [rows] fp32, summing to 1
) -> torch.Tensor:
    """Weighted sum of -log p(target) in nats, differentiable in `student`."""
    grad, total = torch.empty_like(student), torch.zeros((), device=student.device)
    with torch.no_grad():
        for start in range(0, student.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            predicted = F.linear(student[rows], head).float().log_softmax(-1)
            total -= (predicted.gather(1, targets[rows, None]).squeeze(1) * weights[rows]).sum()
            difference = predicted.exp_()
            difference.scatter_add_(1, targets[rows, None], torch.full_like(difference[:, :1], -1.0))
            grad[rows] = difference.mul_(weights[rows, None]).to(head.dtype) @ head
    loss: torch.Tensor = _Precomputed.apply(student, total, grad)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_kl(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row KL(teacher ‖ student) in nats, `[rows]` fp32, and whether the top-1 tokens agree, `[rows]` bool."""
    divergences, agreements = [], []
    for start in range(0, student.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        kl, agree = divergence(F.linear(teacher[rows], head), F.linear(student[rows], head))
        divergences.append(kl)
        agreements.append(agree)
    return torch.cat(divergences), torch.cat(agreements)


@torch.no_grad()
def token_nll(states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-row -log p(target) in nats, `[rows]` fp32."""
    losses = [
        F.cross_entropy(F.linear(rows, head).float(), wanted, reduction="none")
        for rows, wanted in ((states[at : at + ROWS], targets[at : at + ROWS]) for at in range(0, len(states), ROWS))
    ]
    return torch.cat(losses)
