"""What the methods that mix images have in common: how much is kept, with whom, and what that does to the targets.

Every number is drawn on the host from torch's global generator: a checkpoint holds that generator's state, so an
interrupted run draws what the uninterrupted one would have drawn, and no step ever waits for the accelerator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from galago.errors import UserError


def draw_kept(alpha: float, count: int) -> Tensor:
    """`count` numbers from Beta(alpha, alpha), float64, on the host: the share of each image that stays its own."""
    concentration = torch.full((count,), alpha, dtype=torch.float64, device="cpu")
    kept: Tensor = Beta(concentration, concentration).sample()
    return kept


def draw_partners(count: int) -> Tensor:
    """With whom each of `count` images is mixed: a permutation, on the host. An image may meet itself."""
    return torch.randperm(count, device="cpu")


def average(x: Tensor, partners: Tensor, kept: Tensor | float) -> Tensor:
    """`kept * x + (1 - kept) * x[partners]`, a new tensor, of images or of what a layer makes of them.

    >>> average(torch.tensor([[0.0], [8.0]]), torch.tensor([1, 0]), 0.75)
    tensor([[2.],
            [6.]])
    """
    return kept * x + (1 - kept) * x[partners]


def mix_targets(target: Tensor, partners: Tensor, kept: Tensor) -> Tensor:
    """Class probabilities of mixed images: `kept * q + (1 - kept) * q[partners]`.

    Args:
        target: N×K.
        partners: N, on the target's device.
        kept: one number for the batch, or N, on the host.

    >>> mix_targets(torch.eye(2), torch.tensor([1, 0]), torch.tensor([0.75]))
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]])
    """
    share = kept.to(target.device, target.dtype).view(-1, 1)
    return share * target + (1 - share) * target[partners]


def require_shares(alpha: float, probability: float, method: str) -> None:
    """Checks the two numbers that every mixing method takes.

    Raises:
        UserError: one is out of range.
    """
    if alpha <= 0:
        raise UserError(f"{method}: alpha is {alpha}, but a Beta distribution needs a positive number; 1 is usual")
    if not 0 <= probability <= 1:
        raise UserError(f"{method}: probability is {probability}; give a number from 0 to 1")
