"""The photograph of the golden corruption files, what the reference made of it, and how the two are compared."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from galago.corrupt.corruption import Corruption

FOLDER = Path(__file__).parent / "golden" / "regularization"
Array = npt.NDArray[np.generic]


@cache
def golden(kind: str, size: int) -> dict[str, Array]:
    """The arrays of `deterministic`, `seeded` or `statistics` at 32, 64 or 224 pixels."""
    return dict(np.load(FOLDER / f"corruptions_{kind}_{size}.npz"))


def batch(image: Array) -> Tensor:
    """H×W×3 to 1×3×H×W."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))[None]


def photograph(kind: str, size: int) -> Tensor:
    """What the file's images were made from, 1×3×S×S, uint8."""
    arrays = golden(kind, size)
    return batch(arrays["image"] if size < 224 else arrays["image_112"].repeat(2, 0).repeat(2, 1))


def difference(found: Tensor, expected: Array) -> Tensor:
    """How far a corrupted image is from what is stored of the reference's: its upper left corner, in levels."""
    corner = batch(expected).short()
    return (found[..., : corner.shape[-2], : corner.shape[-1]].short() - corner).abs()


def figures(found: Tensor, clean: Tensor) -> Tensor:
    """Mean, standard deviation, PSNR (99 for no change) and mean absolute change of each of N images: N×4."""
    v, change = found.double().flatten(1), (found.double() - clean.double()).flatten(1)
    psnr = (10 * torch.log10(255**2 / change.square().mean(1))).clamp_max(99)
    return torch.stack([v.mean(1), v.std(1, correction=0), psnr, change.abs().mean(1)], 1)


def agrees_with_statistics(corruption: Corruption, size: int, severity: int, images: int) -> bool:
    """Whether own draws have the reference's figures, as far as chance allows."""
    arrays, clean = golden("statistics", size), photograph("statistics", size)
    key = f"{corruption.name}_s{severity}"
    found = figures(corruption(clean.expand(images, -1, -1, -1), severity, range(images)), clean).mean(0)
    draws = 6 if (corruption.name, size) == ("glass_blur", 224) else int(arrays["draws"])
    chance = 4 * torch.from_numpy(arrays[f"{key}_spread"]) * (1 / draws + 1 / images) ** 0.5
    allowed = chance + torch.tensor([0.3, 0.3, 0.1, 0.3], dtype=torch.float64)
    return bool(((found - torch.from_numpy(arrays[f"{key}_stats"])).abs() <= allowed).all())
