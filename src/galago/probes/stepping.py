"""The small step on an image that makes a network surer of it, before an out-of-distribution score is taken.

    x̃ = x - ε sign(∇_x loss),   sign(0) = 1, as in the official codes of those who step so

Chosen here: ε is that of pixels in [0, 1], before normalization, and x̃ is not cut to [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.attacks import Loss, gradient


def stepped(image: Tensor, loss: Loss, epsilon: float) -> Tensor:
    """`x - ε sign(∇_x loss)`, N×C×H×W; the image itself where ε is 0.

    Args:
        image: x, N×C×H×W, pixels in [0, 1].
        loss: from images to N numbers.
        epsilon: ε.

    >>> stepped(torch.full((1, 1, 1, 1), 0.5), lambda x: 3 * x.flatten(), 0.25).item()
    0.25
    """
    return image - epsilon * torch.where(gradient(loss, image) >= 0, 1.0, -1.0) if epsilon else image
