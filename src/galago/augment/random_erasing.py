"""Random erasing: replace a rectangle of a training image by random values.

Zhun Zhong, Liang Zheng, Guoliang Kang, Shaozi Li, Yi Yang, "Random Erasing Data Augmentation", AAAI 2020,
arXiv:1708.04896 (recalled).

In half of the images a rectangle of random size, shape and place is covered with noise; the label stays. Unlike
`galago.augment.cutout` it lies within the image as a whole, and varies from hardly anything to nearly half of it.

    a ~ U(0.02, 0.4),  r ~ U(0.3, 1/0.3),  h = sqrt(a H W r),  w = sqrt(a H W / r), drawn again where it does not fit
    place uniform over all where it fits
    x ← U(0, 1) in every pixel value before normalization, inside;  x outside

When: recognition of people and things that others stand before, and classifiers that overfit; it goes well with flips
and crops. It costs one copy of the batch and as many random numbers.

Usual setting, the defaults: probability 0.5, area from 2 to 40 %, aspect from 0.3 to 1/0.3. Recipe:
recipes/regularize/random_erasing_resnet20_cifar10.yaml.

Chosen here: every image is given ten tries of size and shape; one that none of them fits is left whole (for squares
none in 10¹² images). The random values are drawn where the images are; sizes and places on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.augment.rectangles import filled
from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method

TRIES = 10


def sides(height: int, width: int, area: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width of rectangles, rounded to pixels.

    Args:
        height: of the image.
        width: of the image.
        area: a, in shares of the image, float64.
        aspect: r, height by width, float64.

    >>> sides(32, 32, torch.tensor(0.25), torch.tensor(4.0))
    (tensor(32), tensor(8))
    """
    pixels = area * height * width
    return (pixels * aspect).sqrt().round().long(), (pixels / aspect).sqrt().round().long()


def first_fitting(height: int, width: int, tall: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Of several tries of each image the first that lies within it; 0 by 0 where none does. N integers each.

    Args:
        height: of the images.
        width: of the images.
        tall: heights, N×T.
        wide: widths, N×T.

    >>> first_fitting(8, 8, torch.tensor([[9, 4, 2], [9, 9, 9]]), torch.tensor([[1, 5, 3], [1, 1, 1]]))
    (tensor([4, 0]), tensor([5, 0]))
    """
    fits = (tall <= height) & (wide <= width)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    return tall.gather(1, first)[:, 0] * found, wide.gather(1, first)[:, 0] * found


def uniform(limits: Sequence[float], count: int) -> Tensor:
    """Numbers between two others for each try of so many images, float64, on the host. N×T."""
    low, high = limits
    return low + (high - low) * torch.rand(count, TRIES, dtype=torch.float64, device="cpu")


class RandomErasing(Method):
    """Covers a rectangle of some training images with random values.

    Args:
        probability: of covering something in an image.
        area: smallest and largest share of the image.
        aspect: smallest and largest height by width.
    """

    def __init__(
        self,
        probability: float = 0.5,
        area: Sequence[float] = (0.02, 0.4),
        aspect: Sequence[float] = (0.3, 1 / 0.3),
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise UserError(f"RandomErasing: probability is {probability}; give a number from 0 to 1")
        for name, limits in {"area": area, "aspect": aspect}.items():
            if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
                raise UserError(f"RandomErasing: {name} is {list(limits)}; give the smallest and the largest, above 0")
        if area[1] > 1:
            raise UserError(f"RandomErasing: area is {list(area)}; give shares of the image, up to 1")
        self.probability, self.area, self.aspect = probability, list(area), list(aspect)
        self._data: Data | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        self._data = data  # knows how random values are to be normalized
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        # without a draw at probability 0, so that training is then exactly training without it
        return inner(self.erase(batch) if self.probability > 0 else batch)

    def erase(self, batch: Batch) -> Batch:
        """The batch with rectangles covered; the given one stays as it is."""
        assert self._data is not None, "prepare comes first"
        count, (height, width) = len(batch.input), batch.input.shape[-2:]
        chosen = torch.rand(count, device="cpu") < self.probability
        box = self.boxes(count, height, width) * chosen[:, None]
        values = self._data.normalize(torch.rand_like(batch.input))
        return batch._replace(input=filled(batch.input, box, values))

    def boxes(self, count: int, height: int, width: int) -> Tensor:
        """Rectangles for so many images, N×4 integers (top, bottom, left, right; bottom and right exclusive)."""
        area, aspect = uniform(self.area, count), uniform(self.aspect, count)
        tall, wide = first_fitting(height, width, *sides(height, width, area, aspect))
        top = (torch.rand(count, device="cpu") * (height - tall + 1)).long()
        left = (torch.rand(count, device="cpu") * (width - wide + 1)).long()
        return torch.stack([top, top + tall, left, left + wide], dim=1)
