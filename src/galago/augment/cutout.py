"""Cutout: hide a square of every training image.

Terrance DeVries, Graham W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
arXiv:1708.04552 (recalled, as are its lengths).

A square around a random pixel becomes 0 in normalized images, which is the mean color of the data. The label stays, so
that the network has to recognize an object by the parts that are left.

    center uniform over the pixels,  box of 2⌊L/2⌋ × 2⌊L/2⌋ around it, clipped to the image
    x ← 0 inside the box,  x outside

When: classifiers of small images that overfit. It costs one copy of the batch and one number to choose, L, which
depends on how much of an image an object fills. `galago.augment.cutmix` fills the square with another image instead,
which was better in its authors' comparison.

Usual setting: L = 16 on CIFAR-10, 8 on CIFAR-100 (32 pixels), 112 on ImageNet (224 pixels), in every image. Recipe:
recipes/regularize/cutout_resnet20_cifar10.yaml.

Chosen here: each image has its own square, and `probability` may leave some images whole. A square that the border
cuts is smaller, down to a quarter; the paper found that this helps, for some images stay nearly whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.augment.rectangles import around, filled
from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method


def squares(height: int, width: int, length: int, center_y: Tensor, center_x: Tensor) -> Tensor:
    """The squares to hide, N×4 integers (top, bottom, left, right; bottom and right exclusive), clipped.

    Args:
        height: of the images.
        width: of the images.
        length: L.
        center_y: N integers from 0 to height - 1.
        center_x: N integers from 0 to width - 1.

    >>> squares(32, 32, 16, torch.tensor([10, 0]), torch.tensor([10, 31]))
    tensor([[ 2, 18,  2, 18],
            [ 0,  8, 23, 32]])
    """
    half = torch.tensor(length // 2)
    return around(height, width, half, half, center_y, center_x)


class Cutout(Method):
    """Hides a square of each training image.

    Args:
        length: side of the square in pixels; an odd one loses a pixel.
        probability: of hiding something in an image.
    """

    def __init__(self, length: int = 16, probability: float = 1.0) -> None:
        super().__init__()
        if length < 2:
            raise UserError(f"Cutout: length is {length}, which hides nothing; give 2 or more, 16 is usual on CIFAR-10")
        if not 0 <= probability <= 1:
            raise UserError(f"Cutout: probability is {probability}; give a number from 0 to 1")
        self.length, self.probability = length, probability

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: the square is as large as the images.
        """
        height, width = data.example().shape[-2:]
        if self.length >= min(height, width):
            raise UserError(
                f"Cutout: length is {self.length}, but images have {height}×{width} pixels; give half of it"
            )
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        # without a draw at probability 0, so that training is then exactly training without Cutout
        return inner(self.hide(batch) if self.probability > 0 else batch)

    def hide(self, batch: Batch) -> Batch:
        """The batch with squares hidden; the given one stays as it is."""
        count, (height, width) = len(batch.input), batch.input.shape[-2:]
        chosen = torch.rand(count, device="cpu") < self.probability
        center_y, center_x = torch.randint(height, (count,), device="cpu"), torch.randint(width, (count,), device="cpu")
        box = squares(height, width, self.length, center_y, center_x) * chosen[:, None]
        return batch._replace(input=filled(batch.input, box, torch.zeros((), device=batch.input.device)))
