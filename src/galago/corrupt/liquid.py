"""Spatter: drops of water or mud on the lens.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261; one of the four types that the benchmark keeps for validation.

A liquid layer l = blur_b(N(m, σ²)) is 0 where it is below t.

    mud    M = blur_k(1[l > t]), 0 where below 0.8;   x (1 - M) + M · brown
    water  l in bytes; M = k (l · D) / max(l · D);    x + M · pale turquoise

D is how water refracts light at the rim of a drop: the distance to the nearest edge of l (Canny's edges; a chamfer
distance, at most 20), smoothed, its histogram made even, and embossed.

When: cameras outdoors and on vehicles. Water costs the most of all types, for its edges and distances.

J. Canny, "A Computational Approach to Edge Detection", 1986; G. Borgefors, "Distance Transformations in Digital
Images", 1986. Chosen here: where no water is left (max(l · D) = 0) the image stays as it is; the color of a drop on an
image of one channel is its brightness.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.corrupt.corruption import Corruption, Setting, Settings, gray, truncated, unit
from galago.corrupt.draws import Draws
from galago.corrupt.primitives import blur, correlate

BROWN, TURQUOISE = (63 / 255, 42 / 255, 20 / 255), (175 / 255, 238 / 255, 238 / 255)
EMBOSS = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
_STRAIGHT, _DIAGONAL, _KNIGHT, _FARTHEST = 1.0, 1.4, 2.1969, 20.0
_TANGENT = 2**0.5 - 1  # of 22.5°


def liquid(n: Tensor, m: float, sigma: float, b: float, t: float) -> Tensor:
    """blur_b(m + σ n), 0 where below t. N×H×W."""
    layer = blur(m + sigma * n, b)
    return layer * (layer >= t)


def mud(x: Tensor, layer: Tensor, k: float, t: float) -> Tensor:
    """An image behind drops of mud. x N×C×H×W, layer N×H×W."""
    cover = blur((layer > t).to(x.dtype), k)[:, None]
    cover = cover * (cover >= 0.8)
    return x * (1 - cover) + cover * color(BROWN, x)


def water(x: Tensor, layer: Tensor, k: float) -> Tensor:
    """An image behind drops of water. x N×C×H×W, layer N×H×W."""
    drops = truncated(layer)
    light = drops.to(x.dtype) * refraction(drops)
    cover = k * light / light.amax((1, 2), keepdim=True).clamp_min(1)
    return x + cover[:, None] * color(TURQUOISE, x)


def color(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    """A color for images N×C×H×W: 1×C×1×1."""
    found = like.new_tensor(rgb).view(1, 3, 1, 1)
    return gray(found) if like.shape[1] == 1 else found


def refraction(drops: Tensor) -> Tensor:
    """D: how bright the rim of a drop is. Bytes N×H×W to whole numbers in 0…255, float32."""
    distance = box_mean(chamfer(edges(drops)))
    even = equalized((distance + 1e-5).to(torch.uint8)).float()
    embossed = correlate(even[:, None], EMBOSS)[:, 0].clamp(0, 255)
    return box_mean(embossed).round()


def box_mean(x: Tensor) -> Tensor:
    """The mean of 3×3 neighbors, N×H×W."""
    return correlate(x[:, None], torch.full((3, 3), 1 / 9))[:, 0]


def equalized(images: Tensor) -> Tensor:
    """Bytes with an even histogram, as far as whole levels allow. N×H×W, uint8.

    >>> equalized(torch.tensor([[[3, 3, 7, 9]]], dtype=torch.uint8)).tolist()
    [[[0, 0, 128, 255]]]
    """
    flat = images.flatten(1).long()
    count = torch.zeros(len(flat), 256, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    lowest = count.gather(1, flat.amin(1, keepdim=True))
    scale = 255 / (flat.shape[1] - lowest).clamp_min(1)
    table = ((count.cumsum(1) - lowest) * scale).round().clamp(0, 255)
    return table.gather(1, flat).to(torch.uint8).view(images.shape)


def edges(images: Tensor, low: int = 50, high: int = 150) -> Tensor:
    """Canny's edges of bytes N×H×W: ridges of the gradient above `low` that hang together with one above `high`."""
    gx, gy = sobel(images)
    size = gx.abs() + gy.abs()
    ridge = is_ridge(gx, gy, size)
    weak, strong = ridge & (size > low), ridge & (size > high)
    while not torch.equal(grown := widened(strong) & weak, strong):
        strong = grown
    return strong


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical gradient of bytes N×H×W, int16; the border replicated."""
    v = nn.functional.pad(images[:, None].float(), (1, 1, 1, 1), mode="replicate")[:, 0].to(torch.int16)
    down = v[:, :-2] + 2 * v[:, 1:-1] + v[:, 2:]
    across = v[:, :, :-2] + 2 * v[:, :, 1:-1] + v[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def is_ridge(gx: Tensor, gy: Tensor, size: Tensor) -> Tensor:
    """Where the gradient is larger than on both sides along its own direction, one of four. N×H×W."""
    height, width = size.shape[-2:]
    around = nn.functional.pad(size, (1, 1, 1, 1))

    def at(dy: int, dx: int) -> Tensor:
        return around[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    flat, steep = gy.abs() < _TANGENT * gx.abs(), gx.abs() < _TANGENT * gy.abs()
    falling = (gx < 0) == (gy < 0)
    horizontal = (size > at(0, -1)) & (size >= at(0, 1))
    vertical = (size > at(-1, 0)) & (size >= at(1, 0))
    diagonal = torch.where(falling, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1)))
    return torch.where(flat, horizontal, torch.where(steep, vertical, diagonal))


def widened(mask: Tensor) -> Tensor:
    """A mask and its eight neighbors. N×H×W."""
    row = mask.clone()
    row[:, :, 1:] |= mask[:, :, :-1]
    row[:, :, :-1] |= mask[:, :, 1:]
    found = row.clone()
    found[:, 1:] |= row[:, :-1]
    found[:, :-1] |= row[:, 1:]
    return found


def chamfer(mask: Tensor) -> Tensor:
    """The distance of each pixel to the nearest one of a mask, by steps of 1, 1.4 and 2.1969; at most 20. N×H×W.

    >>> chamfer(torch.tensor([[[True, False, False, False]]]))
    tensor([[[0., 1., 2., 3.]]])
    """
    far = torch.where(mask, 0.0, torch.inf)
    return _swept(_swept(far).flip(1, 2)).flip(1, 2).clamp_max(_FARTHEST)


def _swept(distance: Tensor) -> Tensor:
    """One pass from the upper left: each row from the two above it, then along itself."""
    width = distance.shape[-1]
    place = torch.arange(width, dtype=distance.dtype)
    rows = nn.functional.pad(distance.transpose(0, 1), (2, 2, 0, 0, 2, 0), value=torch.inf).contiguous()
    for y in range(2, len(rows)):
        one, two, row = rows[y - 1], rows[y - 2], rows[y, :, 2:-2]
        for wide, dx, step in (
            (one, 0, _STRAIGHT), (one, 1, _DIAGONAL), (one, -1, _DIAGONAL), (one, 2, _KNIGHT), (one, -2, _KNIGHT),
            (two, 1, _KNIGHT), (two, -1, _KNIGHT),
        ):  # fmt: skip
            torch.minimum(row, wide[:, 2 + dx : 2 + dx + width] + step, out=row)
        row.copy_((row - place).cummin(1).values + place)
    return rows[2:, :, 2:-2].transpose(0, 1)


class Spatter(Corruption):
    """Drops of water (severities 1 to 3) or mud (4 and 5) on the lens; kept for validation."""

    name = "spatter"
    values_at_once = 2**22  # distances are found row by row, for all images together
    settings = Settings(
        cifar=[
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ],
        tiny_imagenet=[
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ],
        imagenet=[
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        m, sigma, b, t, k, muddy = setting
        layer = liquid(draws.normal(*images.shape[-2:]), m, sigma, b, t)
        x = unit(images)
        return truncated(mud(x, layer, k, t) if muddy else water(x, layer, k))
