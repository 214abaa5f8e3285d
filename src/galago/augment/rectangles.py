"""Rectangles in images: where they lie, and putting something else there. For methods that cut, paste and erase.

A table of rectangles is N×4 integers: top, bottom, left, right; bottom and right are the first row and column outside.
It is drawn and computed on the host and goes to the images' device at last.
"""

from __future__ import annotations

import torch
from torch import Tensor


def around(
    height: int, width: int, half_height: Tensor, half_width: Tensor, center_y: Tensor, center_x: Tensor
) -> Tensor:
    """Rectangles around centers, cut off where the image ends. N×4.

    Args:
        height: of the images.
        width: of the images.
        half_height: how far they reach up and down, N integers or one.
        half_width: how far they reach to both sides, N integers or one.
        center_y: N integers from 0 to height - 1.
        center_x: N integers from 0 to width - 1.

    >>> around(8, 8, torch.tensor(2), torch.tensor(3), torch.tensor([3, 0]), torch.tensor([4, 7]))
    tensor([[1, 5, 1, 7],
            [0, 2, 4, 8]])
    """
    vertical = (center_y - half_height).clamp(0, height), (center_y + half_height).clamp(0, height)
    horizontal = (center_x - half_width).clamp(0, width), (center_x + half_width).clamp(0, width)
    return torch.stack([*vertical, *horizontal], dim=1)


def within(box: Tensor, height: int, width: int) -> Tensor:
    """True inside each rectangle, N×H×W, on its device.

    >>> within(torch.tensor([[0, 1, 1, 3]]), 2, 3).int()
    tensor([[[0, 1, 1],
             [0, 0, 0]]], dtype=torch.int32)
    """
    top, bottom, left, right = box.view(-1, 4, 1).unbind(1)
    row, column = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    return rows[:, :, None] & columns[:, None, :]


def filled(image: Tensor, box: Tensor, filling: Tensor) -> Tensor:
    """Images with something else inside their own rectangles. A new tensor.

    Args:
        image: N×…×H×W.
        box: N×4 integers.
        filling: broadcasts to the images, on their device.

    >>> filled(torch.ones(1, 1, 2, 2), torch.tensor([[0, 1, 0, 2]]), torch.tensor(0.0)).tolist()
    [[[[0.0, 0.0], [1.0, 1.0]]]]
    """
    height, width = image.shape[-2:]
    inside = within(box.to(image.device), height, width)
    return torch.where(inside.view(-1, *[1] * (image.ndim - 3), height, width), filling, image)
