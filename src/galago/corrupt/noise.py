"""Noise: of a sensor, of few photons, of broken pixels, of what is multiplied.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

With n drawn from N(0, 1) and u, v from U(0, 1) for each pixel and channel:

    gaussian noise  x + c n        shot noise  Poisson(c x) / c        speckle noise  x + c x n
    impulse noise   1 where u <= c and v <= 1/2,  0 where u <= c and v > 1/2,  otherwise x

When: a camera in little light, a long cable, a cheap sensor. Speckle noise is one of the four types that the benchmark
keeps for validation.

Chosen here: v is u/c, which is again uniform where u <= c, so that one draw does for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.corrupt.corruption import Corruption, Setting, Settings, truncated, unit
from galago.corrupt.draws import Draws


def gaussian_noise(x: Tensor, n: Tensor, c: float) -> Tensor:
    """x + c n. Shapes N×C×H×W.

    >>> gaussian_noise(torch.tensor([0.5]), torch.tensor([-1.0]), 0.25)
    tensor([0.2500])
    """
    return x + c * n


def shot_noise(k: Tensor, c: float) -> Tensor:
    """k photons where c would be white: k / c. `k` N×C×H×W."""
    return k / c


def impulse_noise(x: Tensor, u: Tensor, v: Tensor, c: float) -> Tensor:
    """Each value is replaced with probability c, by 1 or 0. Shapes N×C×H×W.

    >>> impulse_noise(torch.full((3,), 0.4), torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0.3, 0.7, 0.3]), 0.2)
    tensor([1.0000, 0.0000, 0.4000])
    """
    return torch.where(u <= c, (v <= 0.5).to(x.dtype), x)


def speckle_noise(x: Tensor, n: Tensor, c: float) -> Tensor:
    """x + c x n: more where it is bright. Shapes N×C×H×W."""
    return x + c * x * n


class GaussianNoise(Corruption):
    """Noise of a sensor in little light."""

    name = "gaussian_noise"
    settings = Settings(
        cifar=[(0.04,), (0.06,), (0.08,), (0.09,), (0.10,)],
        tiny_imagenet=[(0.04,), (0.08,), (0.12,), (0.15,), (0.18,)],
        imagenet=[(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        (c,) = setting
        return truncated(gaussian_noise(unit(images), draws.normal(*images.shape[1:]), c))


class ShotNoise(Corruption):
    """Noise of few photons."""

    name = "shot_noise"
    settings = Settings(
        cifar=[(500,), (250,), (100,), (75,), (50,)],
        tiny_imagenet=[(250,), (100,), (50,), (30,), (15,)],
        imagenet=[(60,), (25,), (12,), (5,), (3,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        (c,) = setting
        return truncated(shot_noise(draws.poisson(images, int(c)), c))


class ImpulseNoise(Corruption):
    """Broken pixels: salt and pepper, in each channel by itself."""

    name = "impulse_noise"
    settings = Settings(
        cifar=[(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)],
        tiny_imagenet=[(0.01,), (0.02,), (0.05,), (0.08,), (0.14,)],
        imagenet=[(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        (c,) = setting
        u = draws.uniform(0, 1, *images.shape[1:])
        return truncated(impulse_noise(unit(images), u, u / c, c))


class SpeckleNoise(Corruption):
    """Noise that is multiplied, as in radar and ultrasound; kept for validation."""

    name = "speckle_noise"
    settings = Settings(
        cifar=[(0.06,), (0.1,), (0.12,), (0.16,), (0.2,)],
        tiny_imagenet=[(0.15,), (0.2,), (0.25,), (0.3,), (0.35,)],
        imagenet=[(0.15,), (0.2,), (0.35,), (0.45,), (0.6,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        (c,) = setting
        return truncated(speckle_noise(unit(images), draws.normal(*images.shape[1:]), c))
