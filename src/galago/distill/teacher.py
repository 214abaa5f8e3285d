"""How a teacher is asked, and what has to be right before it teaches: classes, normalization, finite scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from galago.batch import Batch
from galago.data import Normalize
from galago.errors import UserError
from galago.task import scores_of

TIMED = 8  # images at a time


class AskedByBatch(nn.Module, ABC):
    """A teacher that answers by more than the images: it may look up what it said of them before."""

    images: int | None = None  # of the full training set; `Distill` says how many

    @abstractmethod
    def answer(self, batch: Batch) -> Tensor:
        """Its scores for a batch, N×K."""


def answers(teacher: nn.Module, batch: Batch) -> Tensor:
    """What a teacher says of a batch: its scores N×K in float32."""
    return scores(teacher.answer(batch) if isinstance(teacher, AskedByBatch) else teacher(batch.input))


def scores(output: Any) -> Tensor:
    """The class scores N×K, in float32 at least, of an output that may be a dict with auxiliary heads."""
    found = scores_of(output)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def require_teachable(student: Tensor, teacher: Tensor) -> None:
    """Compares what both make of one image.

    Raises:
        UserError: other classes, or scores that are not finite.
    """
    require_classes(teacher, student.shape[1])


def require_classes(teacher: Tensor, classes: int) -> None:
    """Looks at what the teacher makes of one image.

    Raises:
        UserError: another number of classes, or scores that are not finite.
    """
    if teacher.shape[1] != classes:
        raise UserError(
            f"the teacher tells {teacher.shape[1]} classes apart, the model {classes}; "
            "give a teacher that was trained for the model's classes"
        )
    if not torch.isfinite(teacher).all():
        raise UserError("the teacher's scores are not finite; its weights are damaged, or it was never trained")


def require_same_normalization(teacher: nn.Module, normalize: Normalize) -> None:
    """Compares what the teacher, or a part of it, was trained on, where it knows (`galago.run.load` notes it).

    Raises:
        UserError: it differs from these data, so that the teacher would see images unlike those it knows.
    """
    for known in (getattr(part, "normalization", None) for part in teacher.modules()):
        if not isinstance(known, Normalize):
            continue
        for name in ("mean", "std"):
            its, ours = (list(map(float, getattr(norm, name).flatten())) for norm in (known, normalize))
            if len(its) != len(ours) or any(abs(a - b) > 1e-4 for a, b in zip(its, ours, strict=True)):
                raise UserError(
                    f"the teacher was trained on images normalized with {name} {rounded(its)}, "
                    f"these data use {rounded(ours)}; give both recipes the same normalization"
                )


def cost(teacher: nn.Module, model: nn.Module, image: Tensor) -> str:
    """What a teacher adds to each step, for a person to read; both networks in evaluation mode.

    Args:
        teacher: answers images.
        model: that learns.
        image: normalized, 1×C×H×W.
    """
    images = image.repeat(TIMED, 1, 1, 1)
    milliseconds = [
        1e3 * Timer("network(images)", globals={"network": network, "images": images}).timeit(2).mean / TIMED
        for network in (teacher, model)
    ]
    weights = sum(tensor.nbytes for tensor in teacher.state_dict().values()) / 2**20
    return (
        f"the teacher: {weights:.1f} MiB of weights, {milliseconds[0]:.2g} ms an image here,"
        f" {milliseconds[0] / milliseconds[1]:.1f} times the model's forward pass"
    )


def rounded(numbers: list[float]) -> list[float]:
    """To four digits, for a message."""
    return [round(number, 4) for number in numbers]
