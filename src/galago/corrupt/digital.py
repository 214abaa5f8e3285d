"""What is done to pixels by accident: contrast, colors, stretching, coarse pixels, compression.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

    contrast  (x - mean) c + mean, the mean of each channel
    HSV       brightness V + c, saturate S c1 + c2, clipped
    pixelate  averaged down to ⌊S c⌋, each pixel drawn as a square        jpeg  encoded with quality c, and decoded
    elastic   an affine map that moves three points by U(-A, A); then what is at (x + dx, y + dy), where dx and dy are
              α blur(σ) of U(-1, 1) at each pixel

When: images that were stored small, sent over a narrow line, or taken with the wrong exposure; elastic stands for
changes of shape. Saturate is one of the four types that the benchmark keeps for validation.

HSV is not gone through: with V = max(x), V + c multiplies all channels by (V + c) / V; another saturation moves them
towards V or away from it. A gray pixel has the hue of red, as it is in HSV.

Chosen here: colors are worked out in float64, because many results are whole levels, which truncation must not make one
less; positions of elastic are exact (the published code rounds them to 1/32 pixel, at most 2 levels away); its
lengths are in units of the image's smaller side, and of 244/224 of it for large images, as published.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from galago.corrupt.corruption import Corruption, Setting, Settings, nearest, truncated, unit
from galago.corrupt.draws import Draws
from galago.corrupt.primitives import blur, reflected


def contrast(x: Tensor, c: float) -> Tensor:
    """(x - mean) c + mean. N×C×H×W."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def brightness(x: Tensor, c: float) -> Tensor:
    """V + c, at most 1, with hue and saturation kept. N×C×H×W.

    >>> brightness(torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1), 0.25).flatten()
    tensor([0.7500, 0.3750, 0.0000])
    """
    value = x.amax(1, keepdim=True)
    brighter = (value + c).clamp(0, 1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(1e-12)), brighter)


def saturate(x: Tensor, c1: float, c2: float) -> Tensor:
    """S c1 + c2, clipped to [0, 1], with hue and value kept. N×3×H×W.

    >>> saturate(torch.tensor([0.5, 0.25, 0.375]).view(1, 3, 1, 1), 2, 0).flatten()
    tensor([0.5000, 0.0000, 0.2500])
    """
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    reach = (value - lowest).clamp_min(1e-12)
    wanted = ((value - lowest) / value.clamp_min(1e-12) * c1 + c2).clamp(0, 1)
    hue = torch.where(value > lowest, (value - x) / reach, x.new_tensor([0, 1, 1]).view(3, 1, 1))
    return value * (1 - wanted * hue)


def boxes(size: int, fewer: int) -> Tensor:
    """The matrix that averages a line of pixels down: each new one is the mean of those whose centers are in it.

    >>> boxes(4, 2)
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    scale = size / fewer
    middle = (torch.arange(fewer, dtype=torch.float64)[:, None] + 0.5) * scale
    first, last = (middle - scale / 2 + 0.5).floor(), (middle + scale / 2 + 0.5).floor()
    place = torch.arange(size)
    inside = ((place >= first) & (place < last)).float()
    return inside / inside.sum(1, keepdim=True)


def pixelate(images: Tensor, c: float) -> Tensor:
    """Bytes, averaged down to ⌊S c⌋ pixels and drawn as large as before. N×C×H×W, uint8."""
    size = images.shape[-2:]
    few = [int(side * c) for side in size]
    down, across = (boxes(side, fewer) for side, fewer in zip(size, few, strict=True))
    small = (images.float() @ across.T + 0.5).floor()
    small = (down @ small + 0.5).floor().to(torch.uint8)
    row, column = (((torch.arange(side) + 0.5) * fewer / side).long() for side, fewer in zip(size, few, strict=True))
    return small.index_select(3, column).index_select(2, row)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encoded as JPEG and decoded, by as many threads as PyTorch uses. N×C×H×W, uint8."""
    work = [(image.numpy(), quality) for image in images]
    threads = min(torch.get_num_threads(), len(work))
    if threads == 1:  # waiting for another thread costs more than a small image
        decoded = [_recoded(*one) for one in work]
    else:
        with ThreadPoolExecutor(threads) as pool:
            decoded = list(pool.map(lambda one: _recoded(*one), work))
    return torch.from_numpy(np.stack(decoded)).view(len(images), *images.shape[2:], -1).permute(0, 3, 1, 2)


def _recoded(image: Any, quality: int) -> Any:
    planes, file = [Image.fromarray(plane) for plane in image], BytesIO()
    merged = planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
    merged.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def affine(image: Tensor, offset: Tensor) -> Tensor:
    """Three points of an image are moved, and the rest with them. N×C×H×W.

    Args:
        image: S×S; the points are its middle and ⌊S/3⌋ to both sides: (+, +), (+, -) and (-, -), as (x, y).
        offset: N×3×2 in pixels.
    """
    height, width = image.shape[-2:]
    corner = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64)
    old = torch.tensor([width / 2, height / 2]) + min(height, width) // 3 * corner
    new = torch.cat([old + offset.double(), offset.new_ones(len(offset), 3, 1)], 2)
    back = torch.linalg.solve(new, old.expand(len(offset), 3, 2))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    here = torch.stack([x, y, torch.ones_like(x)], -1).double()
    place = (here.view(1, -1, 3) @ back).view(-1, height, width, 2)
    scaled = 2 * place / torch.tensor([width - 1, height - 1]) - 1
    return nn.functional.grid_sample(image, scaled.to(image), padding_mode="reflection", align_corners=True)


def warp(image: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """What is at (x + dx, y + dy). Image N×C×H×W; dx and dy N×H×W in pixels."""
    height, width = image.shape[-2:]
    x, y = torch.arange(width) + dx, torch.arange(height)[:, None] + dy
    scaled = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return nn.functional.grid_sample(image, scaled.to(image), padding_mode="reflection", align_corners=False)


def displacement(u: Tensor, alpha: float, sigma: float) -> Tensor:
    """α blur(σ) of what was drawn from U(-1, 1). N×…×H×W."""
    return alpha * blur(u, sigma, truncate=3.0, border=reflected)


class Brightness(Corruption):
    """Too much light."""

    name = "brightness"
    settings = Settings(
        cifar=[(0.05,), (0.1,), (0.15,), (0.2,), (0.3,)],
        tiny_imagenet=[(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
        imagenet=[(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return truncated(brightness(unit(images, torch.float64), setting[0]))


class Contrast(Corruption):
    """Mist, or a bad display."""

    name = "contrast"
    settings = Settings(
        cifar=[(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)],
        tiny_imagenet=[(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
        imagenet=[(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return truncated(contrast(unit(images), setting[0]))


class ElasticTransform(Corruption):
    """Things that are stretched and squeezed."""

    name = "elastic_transform"
    settings = Settings(
        cifar=[(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
        tiny_imagenet=[(0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)],
        imagenet=[(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        side = min(images.shape[-2:])
        unit_length = side * 244 / 224 if nearest(side) == 224 else side
        alpha, sigma, reach = (unit_length * part for part in setting)
        moved = affine(unit(images), draws.uniform(-reach, reach, 3, 2))
        dx, dy = displacement(draws.uniform(-1, 1, 2, *images.shape[-2:]), alpha, sigma).unbind(1)
        return truncated(warp(moved, dx, dy))


class Pixelate(Corruption):
    """An image that was stored small."""

    name = "pixelate"
    settings = Settings(
        cifar=[(0.95,), (0.9,), (0.85,), (0.75,), (0.65,)],
        tiny_imagenet=[(0.9,), (0.8,), (0.7,), (0.6,), (0.5,)],
        imagenet=[(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return pixelate(images, setting[0])


class JPEGCompression(Corruption):
    """An image that was stored in few bytes."""

    name = "jpeg_compression"
    settings = Settings(
        cifar=[(80,), (65,), (58,), (50,), (40,)],
        tiny_imagenet=[(65,), (58,), (50,), (40,), (25,)],
        imagenet=[(25,), (18,), (15,), (10,), (7,)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return jpeg(images, int(setting[0]))


class Saturate(Corruption):
    """Colors too pale or too strong; kept for validation."""

    name = "saturate"
    needs_color = True
    settings = Settings(
        cifar=[(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
        tiny_imagenet=[(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)],
        imagenet=[(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        return truncated(saturate(unit(images, torch.float64), setting[0], setting[1]))
