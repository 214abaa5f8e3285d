"""What several corruptions are made of: blurs, magnification, a moving camera, clouds.

The formulas are those of Hendrycks and Dietterich's benchmark (ICLR 2019, arXiv:1903.12261). What is separable is a
matrix product from both sides (`blur`), borders and all; what is wide and not separable goes through Fourier space
(`correlate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

Border = Callable[[Tensor, int], Tensor]  # positions on an endless line, size of the image → positions in the image


def replicated(position: Tensor, size: int) -> Tensor:
    """a a a | a b c d | d d d.

    >>> replicated(torch.arange(-2, 5), 3).tolist()
    [0, 0, 0, 1, 2, 2, 2]
    """
    return position.clamp(0, size - 1)


def reflected(position: Tensor, size: int) -> Tensor:
    """c b a | a b c | c b a, again and again.

    >>> reflected(torch.arange(-2, 5), 3).tolist()
    [1, 0, 0, 1, 2, 2, 1]
    """
    folded = position % (2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


@lru_cache(maxsize=64)
def blur_matrix(size: int, sigma: float, radius: int, border: Border) -> Tensor:
    """The matrix that blurs a line of so many pixels by a Gaussian, size×size, float64."""
    offset = torch.arange(-radius, radius + 1)
    weight = (-offset.double().square() / (2 * sigma * sigma)).exp()
    source = border(torch.arange(size)[:, None] + offset, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weight / weight.sum()).expand(size, -1))


def blur(x: Tensor, sigma: float, truncate: float = 4.0, border: Border = replicated) -> Tensor:
    """Gaussian blur of N×…×H×W.

    Args:
        x: images.
        sigma: standard deviation in pixels; where the radius is 0, nothing is done.
        truncate: at how many standard deviations weights end.
        border: what lies outside of the image.
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    down, across = (blur_matrix(size, sigma, radius, border).to(x) for size in x.shape[-2:])
    return down @ (x @ across.T)


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of N×C×H×W, weighted by a k×k kernel (k odd); outside of the image: d c b | a b c d | c b a."""
    radius = len(kernel) // 2
    padded = nn.functional.pad(x, (radius, radius, radius, radius), mode="reflect")
    return _summed(padded, kernel, x.shape[-2:]) if len(kernel) <= 7 else _transformed(padded, kernel, x.shape[-2:])


def _summed(padded: Tensor, kernel: Tensor, size: torch.Size) -> Tensor:
    """Shifted images, one for each weight: exact where weights are, and the quicker way for a few."""
    total = padded.new_zeros(*padded.shape[:-2], *size)
    for (row, column), weight in zip(kernel.nonzero().tolist(), kernel[kernel != 0].tolist(), strict=True):
        total.add_(padded[..., row : row + size[0], column : column + size[1]], alpha=weight)
    return total


def _transformed(padded: Tensor, kernel: Tensor, size: torch.Size) -> Tensor:
    """Through Fourier space: the quicker way for many."""
    wide, edge = [quick_size(side) for side in padded.shape[-2:]], len(kernel) - 1
    spectrum = torch.fft.rfft2(padded, s=wide) * torch.fft.rfft2(kernel.flip(0, 1).to(padded), s=wide)
    found: Tensor = torch.fft.irfft2(spectrum, s=wide)
    return found[..., edge : edge + size[0], edge : edge + size[1]]


def quick_size(size: int) -> int:
    """The next length that Fourier transforms are quick for: 2, 3 or 5 times a power of two, or its multiple by 9.

    >>> quick_size(37), quick_size(244)
    (40, 256)
    """
    return min(factor << max(0, math.ceil(math.log2(size / factor))) for factor in (1, 3, 5, 9))


def zoom(x: Tensor, factor: float) -> Tensor:
    """The center of N×C×H×W, magnified: a window of ⌈S/f⌉ is drawn linearly to round(f ⌈S/f⌉) and cut to S.

    Args:
        x: images.
        factor: f, at least 1.
    """
    shape = x.shape[-2:]
    window = [math.ceil(side / factor) for side in shape]
    top, left = ((side - part) // 2 for side, part in zip(shape, window, strict=True))
    size = [round(part * factor) for part in window]
    part = x[..., top : top + window[0], left : left + window[1]]
    drawn = nn.functional.interpolate(part, size, mode="bilinear", align_corners=True)
    top, left = ((wide - side) // 2 for wide, side in zip(size, shape, strict=True))
    return drawn[..., top : top + shape[0], left : left + shape[1]]


def motion_weights(radius: int, sigma: float) -> list[float]:
    """k_i ∝ exp(-i²/2σ²) for i = 0 … 2r; what is too small to move any level is left out.

    >>> [round(k, 6) for k in motion_weights(6, 1.0)[:5]]
    [0.570348, 0.345934, 0.077188, 0.006336, 0.000191]
    """
    weights = [math.exp(-i * i / (2 * sigma * sigma)) for i in range(2 * radius + 1)]
    total = sum(weights)
    return [weight / total for weight in weights if weight / total > 1e-8]


def motion_shift(i: int, theta: float) -> tuple[int, int]:
    """(dy, dx) of step i in direction θ.

    >>> [motion_shift(i, math.radians(30)) for i in range(5)]
    [(0, 0), (0, -1), (-1, -2), (-1, -3), (-2, -3)]
    """
    return -math.ceil(i * math.sin(theta) - 0.5), -math.ceil(i * math.cos(theta) - 0.5)


def motion(v: Tensor, radius: int, sigma: float, theta: Tensor) -> Tensor:
    """What a moving camera sees: out[y, x] = Σ_i k_i v[y - dy_i, x - dx_i], the borders replicated, truncated.

    Args:
        v: images with values in 0…255, N×C×H×W, float32.
        radius: r.
        sigma: σ.
        theta: direction of each image's motion in radians, N.
    """
    height, width = v.shape[-2:]
    weights = motion_weights(radius, sigma)
    wide = len(weights)
    padded = nn.functional.pad(v, (wide, wide, wide, wide), mode="replicate").contiguous()
    out, (image, *stride) = torch.zeros_like(v), padded.stride()
    for n, angle in enumerate(theta.tolist()):
        moved, middle = out[n], n * image + wide * stride[1] + wide
        for i, weight in enumerate(weights):
            dy, dx = motion_shift(i, angle)
            if abs(dy) >= height or abs(dx) >= width:
                break
            moved.add_(padded.as_strided(moved.shape, stride, middle - dy * stride[1] - dx), alpha=weight)
    return (out + 1e-4).floor()  # what should be whole is a little less in float32


def plasma(u: Tensor, size: int, decay: float) -> Tensor:
    """Clouds by diamond and square on a periodic grid, N×P×P in [0, 1], of the given dtype.

    Args:
        u: drawn from U(-1, 1), N×(P² - 1).
        size: P, a power of two.
        decay: by which the roughness w = 100 is divided at each finer step.
    """
    cloud, step, wibble, used = u.new_zeros(len(u), size, size), size, 100.0, 0
    while step >= 2:
        half, count = step // 2, (size // step) ** 2
        rough = wibble * wibble * u[:, used : used + 3 * count].view(-1, 3, size // step, size // step)
        corner = cloud[:, ::step, ::step]
        below, right = corner.roll(-1, 1), corner.roll(-1, 2)
        center = (corner + below + right + below.roll(-1, 2)) / 4 + rough[:, 0]
        cloud[:, ::step, half::step] = (corner + right + center + center.roll(1, 1)) / 4 + rough[:, 1]
        cloud[:, half::step, ::step] = (corner + below + center + center.roll(1, 2)) / 4 + rough[:, 2]
        cloud[:, half::step, half::step] = center
        step, wibble, used = half, wibble / decay, used + 3 * count
    low, high = cloud.amin((1, 2), keepdim=True), cloud.amax((1, 2), keepdim=True)
    return (cloud - low) / (high - low)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below a size.

    >>> power_of_two(28), power_of_two(32), power_of_two(224)
    (32, 32, 256)
    """
    return 1 << (size - 1).bit_length()
