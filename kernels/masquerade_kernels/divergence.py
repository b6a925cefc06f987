"""How far logits are from others over a whole vocabulary, and the gradient that brings them nearer.

A compiled loop on the CPU in bf16 and float32, plain torch elsewhere: torch takes some ten passes over float32 copies
of the logits, the loop reads them as they are. Sums are float32.
"""

from __future__ import annotations

import torch


def divergence(target: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(target ‖ predicted) in nats, `[rows]` fp32, and whether both like the same token best, `[rows]` bool.

    Logits are `[rows, vocabulary]`, of one dtype; of several highest the first counts.
    """
    if _has_loop(target):
        return _looped(target.contiguous(), predicted.contiguous())
    return _plain(target, predicted), target.argmax(-1) == predicted.argmax(-1)


def divergence_and_gradient(
    target: torch.Tensor, predicted: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`divergence`'s KL, and the gradient of its sum under `weights`, `[rows]` fp32, in the predicted logits.

    The gradient is of the logits' dtype and on the CPU takes their place: no other tensor of that size is held.
    """
    if _has_loop(target):
        predicted = predicted.contiguous()
        return _looped(target.contiguous(), predicted, weights.contiguous())[0], predicted
    difference = predicted.float().softmax(-1) - target.float().softmax(-1)
    return _plain(target, predicted), difference.mul_(weights[:, None]).to(predicted.dtype)


def _plain(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    wanted = target.float().log_softmax(-1)
    return (wanted.exp() * (wanted - predicted.float().log_softmax(-1))).sum(-1)


def _has_loop(logits: torch.Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float32)


def _looped(
    target: torch.Tensor, predicted: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    from masquerade_kernels.cpu_divergence import divergence_loop  # noqa: PLC0415  (numba: CUDA needs none)

    # Torch finds each row's highest many at a time, a loop of ours one by one.
    tops = torch.stack([target.amax(-1), predicted.amax(-1)]).float()
    kl, places = torch.empty(len(target)), torch.empty(2, len(target), dtype=torch.int32)
    addresses = [one.data_ptr() for one in (target, predicted, tops, kl, places)]
    loop = divergence_loop(8 * target.dtype.itemsize, torch.get_num_threads())
    loop(*target.shape, *addresses, 0 if weights is None else weights.data_ptr())
    return kl.clamp_(min=0.0), places[0] == places[1]  # of equal logits rounding leaves next to nothing, of either sign
