"""Augmentation of an image as a pure function of (seed, epoch, index): the same whoever loads it, and whenever.

Any `torchvision.transforms.v2` transform (or one's own `nn.Module` from an image to an image) may be used. Before an
image is transformed, the global generators of torch, Python and NumPy are seeded for that image, and put back
afterwards. Random crops and flips at the head of a list are done on the whole batch at once, each image with
randomness of its own; that is several times faster than one image after another and has the same distribution.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from galago.errors import UserError

Seeds = npt.NDArray[np.uint64]


def mix(value: Seeds) -> Seeds:
    """SplitMix64 (Steele, Lea, Flood 2014): well-spread 64-bit numbers from ones that differ in a single bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def seeds_of(seed: int, epoch: int, index: Tensor) -> Seeds:
    """A 64-bit seed for each image of an epoch.

    >>> first, again = seeds_of(0, 1, torch.tensor([5, 6])), seeds_of(0, 1, torch.tensor([6, 7]))
    >>> bool(first[1] == again[0]), bool(first[0] == first[1])
    (True, False)
    """
    run = mix(mix(np.array([seed], dtype=np.int64).view(np.uint64)) + np.uint64(epoch))
    return mix(run + index.numpy().astype(np.uint64))


def uniform(seeds: Seeds, draw: int) -> Tensor:
    """The draw-th number in [0, 1) that belongs to each seed, float64."""
    bits = mix(seeds + mix(np.array([draw], dtype=np.uint64)))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2**53)


def crop(images: Tensor, transform: v2.RandomCrop, place: tuple[Tensor, Tensor]) -> Tensor:
    """`RandomCrop` of a batch, each image at a place of its own.

    Args:
        images: N×C×H×W.
        transform: says size and padding.
        place: how far down and to the right each crop lies, N numbers in [0, 1) each.
    """
    if transform.padding is not None:
        images = functional.pad(images, transform.padding, transform.fill, transform.padding_mode)
    height, width = transform.size
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    top, left = ((u * free).long() for u, free in zip(place, (windows.shape[2], windows.shape[3]), strict=True))
    return windows[torch.arange(len(images)), :, top, left]


def flip(images: Tensor, dimension: int, chosen: Tensor) -> Tensor:
    """The batch with the chosen images reversed along a dimension."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(dimension), images)


def whole_batch(transform: nn.Module, images: Tensor, seeds: Seeds, draw: int) -> Tensor | None:
    """The transform on all images at once, from draws `draw` and `draw + 1`; None where there is no such way."""
    if type(transform) is v2.RandomCrop and _plain(transform):
        return crop(images, transform, (uniform(seeds, draw), uniform(seeds, draw + 1)))
    if type(transform) is v2.RandomHorizontalFlip:
        return flip(images, 3, uniform(seeds, draw) < cast("float", transform.p))
    if type(transform) is v2.RandomVerticalFlip:
        return flip(images, 2, uniform(seeds, draw) < cast("float", transform.p))
    return None


def _plain(transform: v2.RandomCrop) -> bool:
    return not transform.pad_if_needed and isinstance(transform.fill, int | float)


class Augmentation:
    """Transforms in order, as a function of the images and a seed for each.

    Args:
        transforms: from a uint8 image C×H×W to a uint8 image.
    """

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        self.transforms = [part for transform in transforms for part in _parts(transform)]

    def __call__(self, images: Tensor | list[Tensor], seeds: Seeds) -> Tensor | list[Tensor]:
        """Augments; a tensor of equally large images stays one as far as all work on the whole batch.

        Raises:
            UserError: a transform fails on an image, or does not give a uint8 image.
        """
        rest = list(self.transforms)
        while rest and isinstance(images, Tensor):
            with _blaming(rest[:1], images[0]):
                done = whole_batch(rest[0], images, seeds, 2 * (len(self.transforms) - len(rest)))
            if done is None:
                break
            images, rest = done, rest[1:]
        return self._one_by_one(rest, images, seeds) if rest else images

    def _one_by_one(self, rest: list[nn.Module], images: Tensor | list[Tensor], seeds: Seeds) -> list[Tensor]:
        done = []
        with private_generators():
            for image, seed in zip(images, mix(seeds).tolist(), strict=True):
                _seed_generators(seed)
                with _blaming(rest, image):
                    done.append(_checked(_applied(rest, image)))
        return done


def _parts(transform: nn.Module) -> list[nn.Module]:
    if type(transform) is not v2.Compose:
        return [transform]
    return [part for inner in cast("list[nn.Module]", transform.transforms) for part in _parts(inner)]


def _applied(transforms: list[nn.Module], image: Tensor) -> Tensor:
    for transform in transforms:
        image = transform(image)
    return image


def _checked(image: Tensor) -> Tensor:
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.dtype == torch.uint8):
        found = f"{image.dtype} of {image.ndim} dimensions" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"it gives {found} and must give a uint8 image C×H×W;"
            " leave out ToDtype, ToTensor and Normalize: images are normalized on the device"
        )
    return image


@contextmanager
def _blaming(transforms: list[nn.Module], image: Tensor) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a transform may raise, the user is told which one
        names = ", ".join(type(transform).__name__ for transform in transforms)
        shape = "×".join(map(str, image.shape))
        raise UserError(
            f"augment: {names} failed on an image of {shape}: {str(error) or type(error).__name__}"
        ) from error


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - a user's transform may draw from it


@contextmanager
def private_generators() -> Iterator[None]:
    """Whatever is drawn on the CPU within this `with` leaves no trace outside."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
