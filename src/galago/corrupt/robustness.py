"""Robustness to common corruptions: how often is a network wrong when images are noisy, blurred, snowed in or squeezed?

Dan Hendrycks, Thomas Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, arXiv:1903.12261.

Test images are corrupted by each type at each severity. With E_{s,c} the error at severity s of type c:

    corruption_error           mean of all E_{s,c}, the mean corruption error that is usual for CIFAR
    corruption_error_{type}    mean over severities
    corruption_ece             expected calibration error (15 bins) of each of these sets, averaged
    clean_error                without corruption, on the same images
    mce, relative_mce          in relation to AlexNet, in percent, where there are 1000 classes and the whole benchmark

When: a camera will see worse images than the training set has, which is nearly always; and after quantizing or pruning,
which can cost more here than on clean images. Nothing is retrained or adapted: BatchNorm keeps its statistics. It costs
75 passes over the test set for the whole benchmark, and a recipe's probes measure after each epoch: there, choose fewer
`images` and `severities`.

Recipe: recipes/regularize/robust_resnet20_cifar10.yaml.

Usual setting (and the default): fifteen types, five severities, all test images. To tune a method take the four types
of `galago.corrupt.published.extra`, which the paper keeps for that, or others than those you report.

Chosen here: images are corrupted when they are measured, each from its own index, so the same image is corrupted the
same way for every network and file. **Frost** is made up unless photographs are given (`galago.corrupt.weather`): it
is then called `frost_synthetic`, `corruption_error` is close to but not the published benchmark, and numbers in
relation to AlexNet are called `mce_frost_synthetic`. AlexNet's errors are those on ImageNet at 224 pixels; with 1000
classes of other images do not use them. Published files of ImageNet-C were stored as JPEG besides; here they are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from galago.corrupt.corruption import SEVERITIES, Corruption, require_severity
from galago.corrupt.loading import CorruptedBatches, Thinned
from galago.corrupt.published import (
    ALEXNET,
    ALEXNET_CLEAN,
    benchmark,
    mce,
    mean_corruption_error,
    relative_mce,
)
from galago.data import Data, Loader
from galago.errors import UserError
from galago.probe import TEST, Outputs, ViewsProbe
from galago.reliability import answers, judged, reliability
from galago.task import Task

SYNTHETIC = "frost_synthetic"


class CorruptionRobustness(ViewsProbe):
    """Errors and calibration on corrupted test images: `corruption_error`, `corruption_error_fog`, `corruption_ece`, …

    Args:
        corruptions: types; the fifteen of the benchmark where none are named.
        severities: some of 1 to 5.
        images: how many test images, spread evenly over the set; all where no number is given.
    """

    def __init__(
        self,
        corruptions: Sequence[Corruption] | None = None,
        severities: Sequence[int] = SEVERITIES,
        images: int | None = None,
    ) -> None:
        self.corruptions = benchmark() if corruptions is None else list(corruptions)
        self.severities, self.images = list(severities), images
        names = [corruption.name for corruption in self.corruptions]
        _require_distinct("corruptions", names)
        _require_distinct("severities", self.severities)
        for severity in self.severities:
            require_severity("CorruptionRobustness", severity)
        if images is not None and images < 1:
            raise UserError(f"CorruptionRobustness: images is {images}; give 1 or more, or null for all")

    def views(self, data: Data) -> dict[str, Loader]:
        image = data.example()
        for corruption in self.corruptions:
            corruption.require(image)
        clean = data.test() if self.images is None else Thinned(data.test(), self.images)
        return {self._named(TEST): clean} | {
            self._named(view(corruption, severity)): CorruptedBatches(clean, corruption, severity)
            for corruption in self.corruptions
            for severity in self.severities
        }

    def score(self, outputs: Mapping[str, Outputs], task: Task) -> dict[str, float]:
        sets = [
            [outputs[self._named(view(corruption, severity))] for severity in self.severities]
            for corruption in self.corruptions
        ]
        errors = torch.tensor([[error(one, task) for one in row] for row in sets], dtype=torch.float64)
        clean = error(outputs[self._named(TEST)], task)
        named = zip(self.corruptions, errors.mean(1).tolist(), strict=True)
        return {
            "clean_error": clean,
            "corruption_error": mean_corruption_error(errors),
            "corruption_ece": sum(calibration_error(one, task) for row in sets for one in row) / errors.numel(),
            **{f"corruption_error_{corruption.name}": found for corruption, found in named},
            **(self._to_alexnet(errors, clean) if outputs[self._named(TEST)].target.shape[1] == 1000 else {}),
        }

    def _named(self, name: str) -> str:
        """A view's name, with how many images it is thinned to."""
        return name if self.images is None else f"{name}/{self.images}"

    def _to_alexnet(self, errors: Tensor, clean: float) -> dict[str, float]:
        names = [corruption.name for corruption in self.corruptions]
        published = ["frost" if name == SYNTHETIC else name for name in names]
        if {*published} != {*ALEXNET} or {*self.severities} != {*SEVERITIES}:
            return {}
        mark = f"_{SYNTHETIC}" if SYNTHETIC in names else ""
        reference = torch.tensor([[ALEXNET[name]] for name in published], dtype=torch.float64)
        relative = relative_mce(errors, clean, reference, ALEXNET_CLEAN)
        return {f"mce{mark}": mce(errors, reference), f"relative_mce{mark}": relative}


def _require_distinct(key: str, given: Sequence[object]) -> None:
    if not given or len({*given}) < len(given):
        raise UserError(f"CorruptionRobustness: {key} is {list(given)}; name one or more, each once")


def view(corruption: Corruption, severity: int) -> str:
    """The name of a set of corrupted images."""
    return f"corrupted/{corruption.identity()}/{severity}"


def error(outputs: Outputs, task: Task) -> float:
    """The share of wrong decisions."""
    return float((task.decisions(outputs.output) != outputs.target.argmax(1)).double().mean())


def calibration_error(outputs: Outputs, task: Task) -> float:
    """Expected calibration error with 15 bins."""
    return reliability(*answers(*judged(outputs, task))).expected_error()
