"""Weather: snow, frost and fog.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

    snow   a layer l of N(m, σ²), zoomed by z, 0 where below t, as bytes; moved by motion(r, b, θ), θ ~ U(-135°, -45°);
           k x + (1 - k) max(x, 1.5 gray(x) + 0.5) + l + l turned by 180°
    frost  a x + b f, where f is a random window of one of five photographs of frost
    fog    (x + a plasma(d)) · m / (m + a), m the largest value of x

When: cameras outdoors. These three change an image in large areas, where noise and blur are the same everywhere.

**The published photographs of frost are not part of this package.** Without them five textures are made up (clouds of
ice with bright ridges, by `plasma`), and the type is called `frost_synthetic`: its errors must not be compared with
published ones. With `Frost(folder)` the first five images of a folder, in order of name, are used as published, and the
type is called `frost`.

As published, a photograph is scaled to 0.2 for images of the 32-pixel table and to 0.3 for those of the 64-pixel table,
bilinearly and without smoothing; for larger images it is used as it is.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from galago.corrupt.corruption import SIZES, Corruption, Setting, Settings, gray, nearest, truncated, unit
from galago.corrupt.draws import Draws
from galago.corrupt.primitives import motion, plasma, power_of_two, zoom
from galago.errors import UserError

TEXTURES = 5
_SCALES = dict(zip(SIZES, (0.2, 0.3, 1.0), strict=True))


def snow_layer(n: Tensor, m: float, sigma: float, z: float, t: float) -> Tensor:
    """Flakes: where zoomed noise is above t. Noise n of N(0, 1) N×H×W to 0…255, N×1×H×W, float32."""
    layer = zoom((m + sigma * n)[:, None], z)
    return truncated(layer * (layer >= t)).to(n.dtype)


def snow(x: Tensor, layer: Tensor, k: float) -> Tensor:
    """Falling snow in a whitened image. x N×C×H×W, layer N×1×H×W."""
    white = torch.maximum(x, 1.5 * gray(x) + 0.5)
    return k * x + (1 - k) * white + layer + layer.rot90(2, (2, 3))


def frost(v: Tensor, f: Tensor, a: float, b: float) -> Tensor:
    """a v + b f, truncated: images and ice in 0…255. Shapes N×C×H×W, to uint8.

    >>> frost(torch.tensor([100]), torch.tensor([250]), 0.75, 0.25)
    tensor([137], dtype=torch.uint8)
    """
    return (a * v + b * f).clamp(0, 255).to(torch.uint8)


def fog(x: Tensor, cloud: Tensor, a: float) -> Tensor:
    """(x + a cloud) m / (m + a). x N×C×H×W, cloud N×H×W."""
    m = x.amax((1, 2, 3), keepdim=True)
    return (x + a * cloud[:, None]) * m / (m + a)


@lru_cache(maxsize=8)
def made_up_frost(size: int) -> tuple[Tensor, ...]:
    """Five textures: clouds, where they are thick, and bright ridges through their middle. 3×size×size in 0…255.

    They are made about as bright as the published photographs, whose mean is near 155 (read off golden statistics).
    """
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(TEXTURES, 2, size * size - 1, generator=generator, dtype=torch.float64) * 2 - 1
    ice, vein = plasma(u.flatten(0, 1), size, 1.8).view(TEXTURES, 2, size, size).unbind(1)
    ridge = (-((vein - vein.median()) / 0.02).square()).exp()
    thick = (ice - 0.4).clamp_min(0) / 0.6
    light = (0.5 + 0.5 * thick + 0.5 * ridge * ice).clamp(0, 1)
    tint = torch.tensor([0.88, 0.95, 1.0], dtype=torch.float64).view(3, 1, 1)
    return tuple((255 * tint * each).float() for each in light)


@lru_cache(maxsize=8)
def photographs(folder: Path, scale: float) -> tuple[Tensor, ...]:
    """The first five images of a folder, scaled without smoothing, 3×H×W in 0…255.

    Raises:
        UserError: there are no five images, or one cannot be read.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))[:TEXTURES]
    if len(files) < TEXTURES:
        raise UserError(f"Frost: folder {folder} has {len(files)} JPEG or PNG images; {TEXTURES} of frost are needed")
    return tuple(_scaled(_read(file), scale) for file in files)


def _read(file: Path) -> Tensor:
    try:
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise UserError(f"Frost: cannot read {file}: {error}") from error


def _scaled(image: Tensor, scale: float) -> Tensor:
    size = [round(side * scale) for side in image.shape[1:]]
    scaled = nn.functional.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)
    return scaled[0].round()


def window(texture: Tensor, size: torch.Size, place: Tensor) -> Tensor:
    """A window of a texture C×H×W, as far down and to the right as two numbers in [0, 1) say."""
    top, left = (int(u * (full - side)) for u, full, side in zip(place, texture.shape[1:], size, strict=True))
    return texture[:, top : top + size[0], left : left + size[1]]


class Snow(Corruption):
    """Snow that falls."""

    name = "snow"
    settings = Settings(
        cifar=[
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        tiny_imagenet=[
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ],
        imagenet=[
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        m, sigma, z, t, r, b, k = setting
        layer = snow_layer(draws.normal(*images.shape[-2:]), m, sigma, z, t)
        theta = draws.uniform(-3 * math.pi / 4, -math.pi / 4)
        return truncated(snow(unit(images), motion(layer, int(r), b, theta) / 255, k))


class Frost(Corruption):
    """Ice on a window or a lens: `frost_synthetic`, or `frost` with photographs.

    Args:
        folder: of photographs of frost, of which the first five are used; None for textures that are made up.
    """

    name = "frost_synthetic"
    settings = Settings(
        cifar=[(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        tiny_imagenet=[(1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)],
        imagenet=[(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    )

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            self.name = "frost"

    def identity(self) -> str:
        return (
            self.name if self.folder is None else f"{self.name}-{crc32(str(Path(self.folder).resolve()).encode()):08x}"
        )

    def require(self, images: Tensor) -> None:
        super().require(images)
        self.textures(images.shape[-2:])

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        textures, size = self.textures(images.shape[-2:]), images.shape[-2:]
        which, place = draws.integers(0, TEXTURES).tolist(), draws.uniform(0, 1, 2)
        ice = torch.stack([window(textures[i], size, at) for i, at in zip(which, place, strict=True)])
        return frost(images.float(), gray(ice) if images.shape[1] == 1 else ice, *setting)

    def textures(self, size: torch.Size) -> tuple[Tensor, ...]:
        """What ice there is for images of this size, 3×H×W each.

        Raises:
            UserError: a photograph is smaller than the images.
        """
        if self.folder is None:
            return made_up_frost(2 * power_of_two(max(size)))
        found = photographs(Path(self.folder), _SCALES[nearest(min(size))])
        if small := [ice for ice in found if ice.shape[1] < size[0] or ice.shape[2] < size[1]]:
            raise UserError(
                f"Frost: a photograph is {small[0].shape[1]}×{small[0].shape[2]} when scaled, less than the images'"
                f" {size[0]}×{size[1]}; put larger ones into {self.folder}"
            )
        return found


class Fog(Corruption):
    """Fog in front of everything."""

    name = "fog"
    settings = Settings(
        cifar=[(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        tiny_imagenet=[(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
        imagenet=[(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    )

    def corrupt(self, images: Tensor, setting: Setting, draws: Draws) -> Tensor:
        a, d = setting
        height, width = images.shape[-2:]
        side = power_of_two(max(height, width))
        cloud = plasma(draws.uniform(-1, 1, side * side - 1), side, d)[:, :height, :width]
        return truncated(fog(unit(images), cloud, a))
