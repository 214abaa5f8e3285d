"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8×8 pixels, ten classes, no download.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998 (its test
part). Values 0…16 are spread over 0…255. A fixed fifth of every class is the test set and another the validation set.
Real images that train in seconds: for demonstrations, tests and first looks at a method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.transforms import v2

from galago.datasets.images import ImageData, Sources
from galago.datasets.source import Pixels, everything, set_aside
from galago.errors import UserError


class Digits(ImageData):
    """Scikit-learn's embedded handwritten digits.

    Args:
        batch_size: images a training step sees in each process.
        workers: processes that load images; 0 loads them in the training process itself.
        size: side of the images; other than 8, they are resized (bilinear).
        hold_out: training images set aside for validation: below 1 a share, from 1 on a number; 0 validates on the
            test set.
        split_seed: decides which images are for testing, which are set aside and which are kept by `per_class`.
        per_class: train on at most this many images of each class; None for all.
        augment: transforms of training images, in order; None for a shift by up to one eighth, [] for none.
        mean: of the grey values, in units of the image scaled to [0, 1].
        std: of the grey values, likewise.
        together: images of one class that each training batch holds together; None for batches of any images.
    """

    def __init__(
        self,
        batch_size: int = 64,
        workers: int = 0,
        size: int = 8,
        hold_out: float = 0.25,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Sequence[nn.Module] | None = None,
        mean: Sequence[float] = (0.3053,),
        std: Sequence[float] = (0.3763,),
        together: int | None = None,
    ) -> None:
        if size < 8:
            raise UserError(f"size: digits are 8 pixels wide; {size} would lose what tells them apart")
        self.size, self.augment = size, augment
        usual = [v2.RandomCrop(size, padding=size // 8)]
        training, test = _sources(size, split_seed)
        super().__init__(
            sources=Sources(training, test=test),
            classes=tuple("0123456789"),
            mean=mean,
            std=std,
            batch_size=batch_size,
            workers=workers,
            hold_out=hold_out,
            split_seed=split_seed,
            per_class=per_class,
            augment=usual if augment is None else augment,
            together=together,
        )


def _sources(size: int, seed: int) -> tuple[Pixels, Pixels]:
    """Training and test images."""
    images, labels = _read()
    if size != images.shape[-1]:
        images = v2.functional.resize(images, [size, size], antialias=True)
    training, test = set_aside(everything(Pixels(images, labels)), 0.2, seed)
    parts = [Pixels(images[part.positions], labels[part.positions]) for part in (training, test)]
    return parts[0], parts[1]


def _read() -> tuple[Tensor, Tensor]:
    """Images 1797×1×8×8, uint8, and labels."""
    found = load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    return images, torch.from_numpy(found.target)
