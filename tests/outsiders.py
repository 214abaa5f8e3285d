"""The golden network of scores from outside, and small sets: what tests of out-of-distribution detection share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Loader, Normalize
from galago.laws.trial import classify
from galago.outside import Outside
from galago.outside_made_up import Blobs, Uniform
from galago.probe import Deployed

_FILE = np.load(Path(__file__).parent / "golden" / "regularization" / "reliability_metrics_scores_attacks.npz")


def golden(name: str) -> Tensor:
    """One array, in float64 where it is no integer."""
    return torch.from_numpy(np.asarray(_FILE[name]))


class GoldenNetwork(nn.Module):
    """From normalized images to 4 (W f + b), float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2), nn.Linear(8, 5)
        self.double()
        for name, layer in (("c1", self.first), ("c2", self.second), ("fc", self.head)):
            layer.load_state_dict({key: golden(f"net_{name}_{key}") for key in ("weight", "bias")})

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = 4 * self.head(self.second(self.first(x).tanh()).tanh().mean((2, 3)))
        return scores


def golden_network() -> Deployed:
    """The golden network behind its normalization: from pixels in [0, 1] to scores."""
    normalize = Normalize(golden("mean").tolist(), golden("std").tolist()).double()
    normalize.mean, normalize.std = golden("mean").view(-1, 1, 1), golden("std").view(-1, 1, 1)
    return Deployed(GoldenNetwork(), normalize, classify()).eval()


class Pictures(Data):
    """Given images as every part of a data set with one class, in batches of 5.

    Args:
        images: N×C×H×W, uint8.
        classes: K; an image's class is its number modulo K.
    """

    def __init__(self, images: Tensor, classes: int = 3) -> None:
        self.pictures, self.classes, self.batch_size = images, tuple(map(str, range(classes))), 5
        self.normalize = Normalize([0.5] * images.shape[1], [0.25] * images.shape[1])

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        return self.validation()

    def validation(self) -> list[Batch]:
        target = torch.eye(len(self.classes))[torch.arange(len(self.pictures)) % len(self.classes)]
        starts = range(0, len(self.pictures), 5)
        return [Batch(self.pictures[start : start + 5], target[start : start + 5]) for start in starts]

    def example(self) -> Tensor:
        return self.pictures[:1]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random raw images, uint8."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def two_sets() -> list[Outside]:
    """Few images, made up."""
    return [Uniform(images=20), Blobs(images=20)]
