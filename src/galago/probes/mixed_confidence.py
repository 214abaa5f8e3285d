"""Confidence of mixed images: is a network less sure of two images laid over each other than of one?

The check of what RankMixup teaches: Jongyoun Noh, Hyekang Park, Junghyup Lee, Bumsub Ham, "RankMixup: Ranking-Based
Mixup Training for Network Calibration", ICCV 2023, arXiv:2308.11990.

Test images are mixed with others of another class, in fixed shares; confidence is the largest class probability.

    x̃ = round(λ x + (1 - λ) x')        λ = 1, 0.9, 0.8, 0.7, 0.6, 0.5
    mean confidence at each λ, and Spearman's correlation between λ < 1 and confidence over all mixtures

When: with `galago.regularize.rank_mixup`, and with a plain network to compare. A network that knows its limits loses
confidence steadily towards λ = 0.5; many are as sure of a mixture as of an image. It costs six passes over as many
images as are asked for.

Chosen here: images are taken evenly from the whole test set, and each is mixed with another by a permutation that is
always the same; pairs of equal targets are left out. Mixtures are rounded to whole pixel values, so that an exported
file can be asked, too. Equal confidences share their mean rank; where all are equal the correlation is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from galago.batch import Batch
from galago.data import Data, Loader
from galago.errors import UserError
from galago.probe import Outputs, ViewsProbe, spread
from galago.reliability import judged
from galago.task import Task

PERCENT = (50, 60, 70, 80, 90)  # what an image keeps of itself in its mixtures


def ranks(values: Tensor) -> Tensor:
    """The place of each value among all, from 1; equal ones share their mean place. N, float64.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    ordered = values.sort().values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's: the correlation of both's ranks, -1 to 1; 0 where either is constant. N values each.

    >>> round(rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 11.0, 50.0])), 6)
    1.0
    """
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    size = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / size.clamp_min(torch.finfo(torch.float64).tiny))


def partners(images: int) -> Tensor:
    """With which of so many images each is mixed: a permutation, always the same."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))


class _Mixed:
    """Some test images, each mixed with another."""

    def __init__(self, data: Data, images: int, percent: int) -> None:
        self.data, self.images, self.percent = data, images, percent

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        chosen = spread(self.data.test(), self.images)
        image, target = torch.cat([batch.input for batch in chosen]), torch.cat([batch.target for batch in chosen])
        partner, share = partners(len(image)), self.percent / 100
        mixed = (share * image + (1 - share) * image[partner]).round().to(image.dtype)
        target = share * target + (1 - share) * target[partner]
        for part in torch.arange(len(image)).chunk(-(-len(image) // self.data.batch_size)):
            yield Batch(mixed[part], target[part])


class MixedConfidence(ViewsProbe):
    """`mixed_confidence_{percent}` for images that keep so much of themselves, and `mixed_confidence_correlation`.

    Args:
        images: how many test images are mixed.
    """

    def __init__(self, images: int = 1000) -> None:
        if images < 2:
            raise UserError(f"MixedConfidence: images is {images}; 2 or more are needed to mix any")
        self.images = images

    def views(self, data: Data) -> dict[str, Loader]:
        return {self.name(percent): _Mixed(data, self.images, percent) for percent in (*PERCENT, 100)}

    def name(self, percent: int) -> str:
        """Of a view."""
        return f"mixed/{self.images}/{percent}"

    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        whole, half = outputs[self.name(100)].target, outputs[self.name(PERCENT[0])].target
        differ = (whole - half).abs().amax(1) > 1e-6
        if not differ.any():
            raise UserError("MixedConfidence: no two test images have different classes; leave the probe out")
        confidence = {
            percent: judged(outputs[self.name(percent)], task)[0].amax(1)[differ] for percent in (*PERCENT, 100)
        }
        numbers = {f"mixed_confidence_{percent}": float(values.mean()) for percent, values in confidence.items()}
        shares = torch.tensor(PERCENT).repeat_interleave(int(differ.sum()))
        mixed = torch.cat([confidence[percent] for percent in PERCENT])
        return numbers | {"mixed_confidence_correlation": rank_correlation(shares, mixed)}
