"""A data set under common corruption: to see what training, tuning and compression are worth in another domain.

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261, gives the types (`galago.corrupt.corruption`).

    validation and test images are corrupted by one type at one severity; training images only if `training` is set

When: to choose a checkpoint, a threshold or a temperature for the images that a camera will really give; to compare
methods of domain generalization, which train on clean images and are tested on others; with `training`, to see what is
the best that can be had. `CorruptionRobustness` measures all types at once and needs no data set of its own.

Recipe: recipes/regularize/fog_resnet20_cifar10.yaml.

Chosen here: an image is corrupted after augmentation, the same way in every epoch, by its index: this is another
domain, not an augmentation. What `example` gives, and with it what calibrates a quantizer, is as images are in use:
corrupted.
"""

from __future__ import annotations

import copy

from torch import Tensor

from galago.corrupt.corruption import Corruption, require_severity
from galago.corrupt.loading import CorruptedBatches
from galago.data import Data, Loader, Wrapped


class Corrupted(Wrapped):
    """Another data set's images, corrupted.

    Args:
        data: images with one class each.
        corruption: type.
        severity: 1 to 5.
        training: corrupt training images, too.
    """

    def __init__(self, data: Data, corruption: Corruption, severity: int = 3, training: bool = False) -> None:
        require_severity("Corrupted", severity)
        corruption.require(data.example())
        super().__init__(copy.copy(data))
        self.corruption, self.severity, self.training = corruption, severity, training

    def train(self, epoch: int = 0, start: int = 0) -> Loader:
        self.data.seed = self.seed
        loader = self.data.train(epoch, start)
        return CorruptedBatches(loader, self.corruption, self.severity) if self.training else loader

    def validation(self) -> Loader:
        return CorruptedBatches(self.data.validation(), self.corruption, self.severity)

    def test(self) -> Loader:
        return CorruptedBatches(self.data.test(), self.corruption, self.severity)

    def example(self) -> Tensor:
        return self.corruption(self.data.example(), self.severity, [0])
