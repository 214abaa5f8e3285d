"""Common corruptions: what goes wrong between a scene and a network, in nineteen types and five severities.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

This file is the promise that every type keeps. Images x in [0, 1] are changed by a formula with parameters for one of
five severities, then clipped, multiplied by 255 and *truncated*, as the published data sets are. Parameters come from
the nearest of three published tables: for images of 32 (CIFAR), 64 (Tiny ImageNet) and 224 pixels (ImageNet).

Randomness belongs to the image (`galago.corrupt.draws`): the same index gives the same corrupted image, whatever batch
it comes in. A formula takes what was drawn as an argument, so each is a pure function.

Chosen here: the size that counts is the smaller side; an image of one channel is treated like a color image with three
equal ones, but for types that change nothing except color, which refuse it. All is done on the CPU, where loaders give
images, and for many images together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galago.corrupt.draws import Draws, seed_of
from galago.errors import UserError

Setting = Sequence[float]  # the parameters of one severity, as the type's formula names them
SIZES = (32, 64, 224)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 8  # pixels; below, a severe blur is wider than the image


class Settings(NamedTuple):
    """The published tables: the parameters of severities 1 to 5 for three sizes of images."""

    cifar: Sequence[Setting]
    tiny_imagenet: Sequence[Setting]
    imagenet: Sequence[Setting]

    def at(self, size: int) -> Sequence[Setting]:
        """Those for images of this size."""
        return self[SIZES.index(nearest(size))]


class Corruption(ABC):
    """One way in which images become worse.

    Attributes:
        name: of the type, as the benchmark has it.
        settings: its parameters.
        needs_color: whether it makes no sense for images of one channel.
        values_at_once: how many are worked on together, so that they stay in the processor's cache.
    """

    name: str
    settings: Settings
    needs_color: bool = False
    values_at_once: int = 2**18

    def __call__(self, images: Tensor, severity: int, indices: Iterable[int]) -> Tensor:
        """Corrupted images, N×C×H×W, uint8.

        Args:
            images: N×C×H×W, uint8, of 1 or 3 channels.
            severity: 1 to 5.
            indices: N numbers that decide what is drawn for each image: its place in its set.

        Raises:
            UserError: the severity does not exist, or images are of a kind that it cannot be applied to.
        """
        require_severity(self.name, severity)
        self.require(images)
        seeds = [seed_of(int(index), self.name, severity) for index in indices]
        if len(seeds) != len(images):
            raise ValueError(f"{len(images)} images need as many indices, not {len(seeds)}")
        at_once = max(1, self.values_at_once // max(1, images[:1].numel()))
        parts = [
            self.corrupt(part, self.setting(images, severity), Draws(seeds[first : first + at_once]))
            for first, part in zip(range(0, len(images), at_once), torch.split(images, at_once), strict=False)
        ]
        return torch.cat(parts) if len(images) else images.clone()

    def identity(self) -> str:
        """Everything about this type that decides how an image comes out; for the name of a set of images."""
        return self.name

    @abstractmethod
    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        """Corrupted images, N×C×H×W, uint8.

        Args:
            images: N×C×H×W, uint8.
            setting: the parameters of a severity.
            draws: random numbers for these N images.
        """

    def setting(self, images: Tensor, severity: int) -> Setting:
        """The parameters for images of this size."""
        return self.settings.at(min(images.shape[-2:]))[severity - 1]

    def require(self, images: Tensor) -> None:
        """Checks that these images can be corrupted so.

        Raises:
            UserError: they cannot.
        """
        if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name}: images must be uint8, N×1×H×W or N×3×H×W, not {images.dtype},"
                f" {'×'.join(map(str, images.shape))}"
            )
        if self.needs_color and images.shape[1] == 1:
            raise UserError(f"{self.name}: it changes colors, and these images have none; leave it out")
        if min(images.shape[-2:]) < SMALLEST:
            raise UserError(
                f"{self.name}: images of {images.shape[-2]}×{images.shape[-1]} are too small; corruptions need"
                f" {SMALLEST}×{SMALLEST} or more"
            )


def require_severity(name: str, severity: int) -> None:
    """Checks that a severity exists.

    Raises:
        UserError: it does not.
    """
    if severity not in SEVERITIES:
        raise UserError(f"{name}: severity is {severity}; give one from 1 to 5")


def nearest(size: int) -> int:
    """Which published table is for images of this size: that of 32, 64 or 224 pixels.

    >>> nearest(28), nearest(96), nearest(160)
    (32, 64, 224)
    """
    return min(SIZES, key=lambda table: abs(table - size))


def unit(images: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Bytes to x in [0, 1]."""
    return images.to(precision) / 255


def truncated(x: Tensor) -> Tensor:
    """x, clipped to [0, 1], as bytes without rounding.

    >>> truncated(torch.tensor([-0.1, 0.5, 1.2])).tolist()
    [0, 127, 255]
    """
    return x.clamp(0, 1).mul(255).to(torch.uint8)


def gray(x: Tensor) -> Tensor:
    """Brightness as the eye weighs colors, N×1×H×W, of N×3×H×W; one channel is left as it is.

    >>> gray(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).item()
    0.29899999...
    """
    if x.shape[1] == 1:
        return x
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
