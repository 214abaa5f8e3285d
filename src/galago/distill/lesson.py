"""The promise of every distillation loss: a `Lesson` is one measure of how far a model is from its teacher.

`galago.distill.distill.Distill` runs the teacher once in a step, whatever the number of lessons, and hands each what
it asked for: the scores of both networks, and what some of their layers gave out. A lesson that compares layers names
them, by path or by number of stage (0 is the first resolution, -1 the last); its method's usual ones are the default.
One that makes images of its own asks either network about them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.schedule import Schedule


def nobody(images: Tensor) -> Tensor:
    """Answers where no network stands behind a view, as in `fit`."""
    raise RuntimeError("only in a training step there is a network to ask")


class View(NamedTuple):
    """What one network made of a batch.

    `ask` gives the same network's scores M×K, float32, of other normalized images, in the mode it is in (the model
    trains: its BatchNorm sees them), with gradients wherever they are wanted. `features` remain those of the batch, for
    the lessons that follow too.
    """

    scores: Tensor  # N×K, float32
    features: list[Tensor]  # of the lesson's layers, in order, float32
    ask: Callable[[Tensor], Tensor] = nobody


class Seen(NamedTuple):
    """What a lesson is given in a step."""

    student: View
    teacher: View  # scores and features without gradients
    batch: Batch  # as the model saw it; so did the teacher, unless `Distill` shows it another view
    progress: float  # of the whole training, 0 to 1


class Lesson(nn.Module, ABC):
    """One loss between a model and its teacher. Networks of its own (adapters) are made in `fit`, and train along.

    Args:
        weight: of the loss; a schedule gives it by progress.
        layers: of the model, by path or number of stage; none for a lesson on scores.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        layers: Sequence[str | int] = (),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.layers = list(layers)
        self.teacher_layers = list(self.layers if teacher_layers is None else teacher_layers)
        self.paths: list[str] = []  # of both, when stages have been found
        self.teacher_paths: list[str] = []
        self.images: int | None = None  # of the full training set, for what is kept by `batch.extra["index"]`
        if len(self.layers) != len(self.teacher_layers):
            raise UserError(
                f"{type(self).__name__}: {len(self.layers)} layers of the model are to be compared with"
                f" {len(self.teacher_layers)} of the teacher; name as many of both"
            )

    def fit(self, student: View, teacher: View) -> None:
        """Once, before training, with what both networks make of one image: builds adapters.

        Raises:
            UserError: these shapes cannot be compared.
        """

    @abstractmethod
    def forward(self, seen: Seen) -> Tensor:
        """The loss, a scalar, not weighted."""

    def adapters(self) -> list[str]:
        """What stands between each pair of layers, for a person to read."""
        return ["" for _ in self.paths]


def at(value: float | Schedule, progress: float) -> float:
    """A number that may change with progress.

    >>> at(4.0, 0.5)
    4.0
    """
    return value(progress) if isinstance(value, Schedule) else value


def pooled(feature: Tensor) -> Tensor:
    """An embedding N×C of a feature map N×C×H×W or of tokens N×T×C: their mean.

    >>> import torch
    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 5, 3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if feature.ndim == 3:
        return feature.mean(1)
    return feature.flatten(2).mean(2) if feature.ndim > 3 else feature
