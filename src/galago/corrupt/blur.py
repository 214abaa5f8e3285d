"""Blur: out of focus, through frosted glass, in motion, while zooming, and the plain Gaussian one.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261; motion by shifts as in the package of Michaelis et al., "Benchmarking Robustness in Object
Detection", arXiv:1907.07484.

    defocus   each channel weighted by disk(r, a)        gaussian  blur(c)
    motion    motion(r, σ, θ),  θ ~ U(-45°, 45°)
    zoom      (x + Σ_{f in F} zoom(x, f)) / (n + 1),  F = 1, 1 + step, … of n factors
    glass     blur(σ), as bytes; n times, from the last pixel to the first: pixel (h, w) ← pixel (h + dy, w + dx) with
              dx, dy from {-δ … δ - 1}; blur(σ)

Glass runs over pixels one after another, and a pixel may take what another has just taken. Here these chains are
followed for all pixels at once, each to its end in a logarithmic number of jumps, with the same result.

When: cameras that move, lenses that are dirty or badly set. Gaussian blur is one of the four types that the benchmark
keeps for validation.

As in the published data, glass *copies* the neighbor; the paper speaks of exchanging both. Zoom takes as many factors
as the published code really does, which is one more than it means to at some severities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galago.corrupt.corruption import Corruption, Setting, Settings, truncated, unit
from galago.corrupt.draws import Draws
from galago.corrupt.primitives import blur, correlate, motion, zoom


def disk(r: float, a: float) -> Tensor:
    """A disk of radius r, smoothed by a Gaussian of σ = a: what a point looks like out of focus. k×k, float64.

    >>> disk(1, 0.1)[7:10, 7:10].round(decimals=6)
    tensor([[0.0000, 0.2000, 0.0000],
            [0.2000, 0.2000, 0.2000],
            [0.0000, 0.2000, 0.0000]], dtype=torch.float64)
    """
    reach, taps = (8, 1) if r <= 8 else (int(r), 2)
    square = torch.arange(-reach, reach + 1, dtype=torch.float64).square()
    inside = (square[:, None] + square <= r * r).double()
    weight = (-torch.arange(-taps, taps + 1, dtype=torch.float64).square() / (2 * a * a)).exp()
    weight = weight / weight.sum()
    padded = torch.nn.functional.pad(inside[None, None], (taps,) * 4, mode="reflect")
    smooth = torch.nn.functional.conv2d(padded, torch.outer(weight, weight)[None, None])[0, 0]
    return smooth / inside.sum()


def without_zeros(kernel: Tensor) -> Tensor:
    """The middle of a symmetric kernel, without what is too little to count."""
    kernel = torch.where(kernel > 1e-12, kernel, 0.0)
    edge = int(kernel.any(1).nonzero()[0])
    return kernel[edge : len(kernel) - edge, edge : len(kernel) - edge]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """blur(σ) of bytes; what is of one level stays so, though float32 adds up to a little less."""
    return truncated(blur(unit(images), sigma) + 1e-6)


def zoom_blur(x: Tensor, factors: int, step: float) -> Tensor:
    """The mean of an image and its magnified centers.

    Args:
        x: N×C×H×W.
        factors: n, of which the first is 1.
        step: between factors.
    """
    total = x.clone()
    for i in range(factors):
        total += zoom(x, 1 + i * ((1 + step) - 1))  # factors as a floating-point range counts them
    return total / (factors + 1)


def glass(images: Tensor, dx: Tensor, dy: Tensor, delta: int) -> Tensor:
    """One pass of glass over images N×C×H×W.

    Args:
        images: of any type.
        dx: N×(H - 2δ)×(W - 2δ) from {-δ … δ - 1}, in the order in which pixels are visited: from the last to the first.
        dy: likewise.
        delta: δ.

    >>> row = torch.arange(5, dtype=torch.uint8).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    >>> left, still = torch.full((1, 3, 3), -1), torch.zeros(1, 3, 3, dtype=torch.long)
    >>> glass(row, left, still, 1)[0, 0, 3].tolist()
    [0, 1, 1, 2, 3]
    """
    height, width = images.shape[-2:]
    own = torch.arange(height * width).view(height, width)
    source = own.expand(len(images), height, width).clone()
    rows, columns = slice(delta + 1, height - delta + 1), slice(delta + 1, width - delta + 1)
    source[:, rows, columns] += (dy * width + dx).flip(1, 2)
    visited = torch.zeros(height, width, dtype=torch.bool)
    visited[rows, columns] = True
    own, source, visited = own.flatten(), source.flatten(1), visited.flatten()
    taken = (source > own) & visited[source]  # from a pixel that has been visited before, and so holds another's value
    end = torch.where(taken, source, own)
    while not torch.equal(further := end.gather(1, end), end):
        end = further
    origin = source.gather(1, end)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, origin).view(images.shape)


class DefocusBlur(Corruption):
    """A lens out of focus."""

    name = "defocus_blur"
    settings = Settings(
        cifar=[(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        tiny_imagenet=[(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
        imagenet=[(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return truncated(correlate(unit(images), without_zeros(disk(*setting))))


class GlassBlur(Corruption):
    """A view through frosted glass."""

    name = "glass_blur"
    settings = Settings(
        cifar=[(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        tiny_imagenet=[(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
        imagenet=[(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        sigma, delta, passes = setting[0], int(setting[1]), int(setting[2])
        height, width = images.shape[-2:]
        images = blurred(images, sigma)
        for _ in range(passes):
            dx, dy = draws.integers(-delta, delta, 2, height - 2 * delta, width - 2 * delta).unbind(1)
            images = glass(images, dx, dy, delta)
        return blurred(images, sigma)


class MotionBlur(Corruption):
    """A camera that moves."""

    name = "motion_blur"
    settings = Settings(
        cifar=[(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        tiny_imagenet=[(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
        imagenet=[(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        theta = draws.uniform(-math.pi / 4, math.pi / 4)
        return motion(images.float(), int(setting[0]), setting[1], theta).to(torch.uint8)


class ZoomBlur(Corruption):
    """A camera that comes closer."""

    name = "zoom_blur"
    settings = Settings(
        cifar=[(7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)],
        tiny_imagenet=[(7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)],
        imagenet=[(12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return truncated(zoom_blur(unit(images), int(setting[0]), setting[1]))


class GaussianBlur(Corruption):
    """The plain blur; kept for validation."""

    name = "gaussian_blur"
    settings = Settings(
        cifar=[(0.4,), (0.6,), (0.7,), (0.8,), (1,)],
        tiny_imagenet=[(0.5,), (0.75,), (1,), (1.25,), (1.5,)],
        imagenet=[(1,), (2,), (3,), (4,), (6,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return blurred(images, setting[0])
