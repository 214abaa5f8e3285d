"""Paired comparison: is one network better than another on the same images, or is it chance?

Bootstrap: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, 1979 (percentile form).

Both networks judged the same N images, so the difference is taken image by image, d_i = b_i − a_i, and only the images
on which they differ matter. Images are drawn again with replacement, R times; the middle 95 % of the R means of d is
the interval. With few images this is far narrower than the intervals of the two accuracies taken apart.

When to use it: before saying that a quantized network lost or gained accuracy. An interval that holds 0 means that
these images cannot tell. It covers the choice of images, not that of the training seed.

>>> import torch
>>> first = torch.tensor([1.0, 1.0, 0.0, 1.0]).repeat(100)
>>> second = torch.tensor([1.0, 1.0, 1.0, 1.0]).repeat(100)
>>> difference, low, high = paired_difference(first, second)
>>> difference, 0.20 < low < 0.22, 0.28 < high < 0.30
(0.25, True, True)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from galago.errors import UserError


class Difference(NamedTuple):
    """Second minus first, and where the middle share of the resampled differences lies."""

    difference: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: Tensor, second: Tensor, rounds: int = 1000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Mean of `second − first` over the images, with its bootstrap interval.

    Args:
        first: N, a number an image: 1 where the first network was right, or its loss there.
        second: N, the same of the second network, in the same order of images.
        rounds: how often the images are drawn again.
        level: share of the resampled differences inside the interval.
        seed: of the draws; the global random state is not touched.

    Raises:
        UserError: the two did not judge the same number of images.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise UserError(
            f"a paired comparison needs one number an image of each: {first.shape} and {second.shape} given"
        )
    apart = second.double().cpu().numpy() - first.double().cpu().numpy()
    # Images with equal differences are interchangeable: drawing how many of each is the same, and quick.
    values, counts = np.unique(apart, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(apart), counts / len(apart), size=rounds)
    means = draws @ values / len(apart)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(apart.mean()), float(low), float(high))
