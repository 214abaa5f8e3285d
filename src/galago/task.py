"""What is being learned: how an output is judged while training and measured afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from galago.batch import Batch
from galago.errors import UserError


class Task(nn.Module, ABC):
    """Turns outputs into losses, predictions and metrics. Knows nothing about any method."""

    def at(self, progress: float) -> Task:
        """The task as it is when `progress` of the whole training (0 to 1) is over: by default always the same."""
        return self

    @abstractmethod
    def losses(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """The task's own loss terms, each a scalar."""

    @abstractmethod
    def decode(self, output: Any) -> Any:
        """What a user sees: probabilities, masks, boxes. Exported inside the artifact."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """A fresh collection, updated with `(decode(output), batch.target)`."""

    @abstractmethod
    def decisions(self, output: Any) -> Tensor:
        """The choices that an exported file must share with the trained model, N×…, integers (the arg-max class)."""

    def reservation(self, output: Any) -> Tensor | None:
        """How far each answer is kept back, N numbers in [0, 1]; None where a task always answers, the default."""
        return None


def scores_of(output: Any) -> Tensor:
    """The class scores N×K, of an output that may be a dict with auxiliary heads."""
    scores: Tensor = output["main"] if isinstance(output, dict) else output
    return scores


def require_probabilities(batch: Batch, method: str) -> Tensor:
    """The batch's target, where a method reads it as class probabilities.

    Raises:
        UserError: the target is not a table of class probabilities.
    """
    target = batch.target
    if not isinstance(target, Tensor) or target.ndim != 2 or not target.is_floating_point():
        found = (
            f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        )
        raise UserError(f"{method} needs class probabilities N×K as targets, not {found}; leave it out for this task")
    return target


def class_scores(output: Any, task: Task) -> Tensor:
    """The scores of the classes alone, N×K: without that of a reservation, which comes last where there is one."""
    return scores_of(output)[:, : task.decode(output).shape[1]]
