"""Image classification: one class an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.aggregation import MeanMetric

from galago.batch import Batch
from galago.task import Task, scores_of


class Classify(Task):
    """Cross-entropy against class probabilities; a dict of outputs is judged by its entry `main`.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """`cross_entropy`, averaged over the batch; targets are probabilities N×K."""
        return {"cross_entropy": nn.functional.cross_entropy(scores_of(output), batch.target)}

    def decode(self, output: Any) -> Tensor:
        """Class probabilities, N×K."""
        return scores_of(output).softmax(1)

    def decisions(self, output: Any) -> Tensor:
        """The most likely class, N."""
        return scores_of(output).argmax(1)

    def metrics(self) -> MetricCollection:
        """`accuracy` in [0, 1]."""
        return MetricCollection({"accuracy": TopAccuracy()})


class TopAccuracy(MeanMetric):
    """The share of inputs whose most likely class is the target's. A constant prediction is not rewarded by ties."""

    def update(self, probabilities: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update((probabilities.argmax(1) == target.argmax(1)).float())
