"""Random numbers that belong to an image: the same whoever asks, in whatever batch, on whatever day.

An image's seed is a hash of its index, the type of corruption and the severity; each further draw hashes it again. So
the noise on an image does not depend on which images are around it, and 10,000 images can be corrupted in any order
and by any number of processes.

Counts of photons are drawn by the alias method (A. J. Walker, "An Efficient Method for Generating Discrete Random
Variables with General Distributions", 1977): of M equally likely columns, each is shared by at most two counts. There
are but 256 rates, one a level of a byte, so the columns are worked out once, and a draw costs one random number and
one look. Counts above the largest that matters are given as that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from zlib import crc32

import torch
from torch import Tensor

_BITS = 2**64 - 1


def mix(value: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): well-spread 64-bit numbers from ones that differ in a single bit."""
    value = (value + 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)


def seed_of(index: int, name: str, severity: int) -> int:
    """The seed of an image's corruption.

    Args:
        index: of the image.
        name: of the type of corruption.
        severity: 1 to 5.

    >>> seed_of(3, "fog", 1) == seed_of(3, "fog", 1), seed_of(3, "fog", 1) == seed_of(4, "fog", 1)
    (True, False)
    """
    return mix(index + mix(crc32(f"{name}/{severity}".encode())))


class Draws:
    """Random numbers for N images; each call gives new ones, N×… on the CPU.

    Args:
        seeds: one an image.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds, self._generator = list(seeds), torch.Generator()

    def normal(self, *shape: int) -> Tensor:
        """From N(0, 1)."""
        drawn = torch.empty(len(self.seeds), *shape)
        for image in self._seeded(drawn):
            image.normal_(generator=self._generator)
        return drawn

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """From U(low, high)."""
        drawn = torch.empty(len(self.seeds), *shape)
        for image in self._seeded(drawn):
            image.uniform_(low, high, generator=self._generator)
        return drawn

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Equally likely from low, low + 1, … high - 1; int32."""
        drawn = torch.empty(len(self.seeds), *shape, dtype=torch.int32)
        for image in self._seeded(drawn):
            image.random_(low, high, generator=self._generator)
        return drawn

    def poisson(self, level: Tensor, scale: int) -> Tensor:
        """Counts with mean scale · level/255, at most `scale`; those that would be higher are given as that.

        Args:
            level: N×…, uint8.
            scale: the mean at level 255.
        """
        share, other = photon_columns(scale)
        place = self.integers(0, 2**31 - 1, *level.shape[1:]).double().mul_((scale + 1) / (2**31 - 1))
        column = place.int()
        where = level.int().mul_(scale + 1).add_(column).flatten()
        kept = place.sub_(column).flatten() < share.index_select(0, where)
        return torch.where(kept, column.flatten(), other.index_select(0, where)).view(level.shape)

    def _seeded(self, drawn: Tensor) -> Iterator[Tensor]:
        """Each image's part of what is to be drawn, when the generator is seeded for it."""
        self.seeds = [mix(seed) for seed in self.seeds]
        for seed, image in zip(self.seeds, drawn.unbind(), strict=True):
            self._generator.manual_seed(seed)
            yield image


@lru_cache(maxsize=16)
def photon_columns(scale: int) -> tuple[Tensor, Tensor]:
    """Columns of the alias method for Poisson counts 0 … scale, for each level of a byte.

    Args:
        scale: c; level v has the rate c v/255.

    Returns:
        What share of each column is its own count, and the count that has the rest; 256 · (scale + 1) each.
    """
    rest = photon_probabilities(scale) * (scale + 1)
    share, other, levels = torch.ones_like(rest), torch.arange(scale + 1).repeat(256, 1), torch.arange(256)
    least, most = rest.clone(), rest.clone()  # of the columns that are not full yet; the others are infinitely far
    for _ in range(scale):
        poor, rich = least.argmin(1), most.argmax(1)
        share[levels, poor], other[levels, poor] = least[levels, poor], rich
        left = most[levels, rich] - (1 - least[levels, poor])
        least[levels, rich] = most[levels, rich] = left
        least[levels, poor], most[levels, poor] = torch.inf, -torch.inf
    return share.flatten(), other.flatten().int()


def photon_probabilities(scale: int) -> Tensor:
    """P(count = k) of Poisson counts, for each level of a byte; the last k has all that is higher. 256×(scale + 1).

    >>> photon_probabilities(2)[0]
    tensor([1., 0., 0.], dtype=torch.float64)
    """
    rate = scale * torch.arange(256, dtype=torch.float64)[:, None] / 255
    count = torch.arange(scale, dtype=torch.float64)
    below = (torch.special.xlogy(count, rate) - rate - torch.lgamma(count + 1)).exp()
    return torch.cat([below, (1 - below.sum(1, keepdim=True)).clamp_min(0)], 1)
