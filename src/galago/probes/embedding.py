"""The features in front of a network's classifier, and those of training images, which others are compared with.

Training images are plain, not augmented, as test images are: random crops changed the statistics of a network's
features so much that test images looked like images from outside. Images for validation may be those for testing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from galago.batch import Batch
from galago.data import Data
from galago.errors import UserError
from galago.probe import Deployed
from galago.taps import CLASSIFIER, Taps

Embed = Callable[[Tensor], Tensor]  # raw images to features N×d, on the CPU, as not every device has float64


@contextmanager
def embedding(deployed: Deployed) -> Iterator[Embed]:
    """A function from raw images to what the last linear layer takes in, N×d, as long as the `with` lasts.

    Features with positions, N×…×d, are averaged over these. Gradients flow where they are switched on.

    Raises:
        UserError: the network has no linear layer.
    """
    taps = Taps(deployed.network, [CLASSIFIER])

    def embed(image: Tensor) -> Tensor:
        deployed(image)
        feature: Tensor = taps.values[CLASSIFIER]
        return (feature.flatten(1, -2).mean(1) if feature.ndim > 2 else feature).cpu()

    try:
        yield embed
    finally:
        taps.remove(deployed.network)


def training_batches(data: Data, images: int) -> Iterator[Batch]:
    """The first of shuffled batches, that hold so many images together; raw, all where there are no more."""
    seen = 0
    for batch in data.plain():
        if seen >= images:
            return
        yield batch
        seen += len(batch.input)


@torch.no_grad()
def fitted_on(embed: Embed, data: Data, images: int, device: torch.device, whose: str) -> tuple[Tensor, Tensor]:
    """Features N×d, float64, and labels N of training images.

    Args:
        embed: from raw images to features.
        data: where the images come from; the most likely class is an image's label.
        images: how many, up to whole batches.
        device: of the network.
        whose: name of the score that they are for.

    Raises:
        UserError: there are none, or a feature is no number.
    """
    found = [
        (embed(batch.input.to(device)).double(), batch.target.cpu().argmax(1))
        for batch in training_batches(data, images)
    ]
    if not found:
        raise UserError(f"{whose}: there are no training images to take features of")
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not features.isfinite().all():
        raise UserError(f"{whose}: the network's features of training images are no finite numbers; has it diverged?")
    return features, labels
