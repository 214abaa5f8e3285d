"""What has to be right about a teacher before it teaches: classes, normalization, finite scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.errors import UserError


def scores(output: Any) -> Tensor:
    """The class scores N×K in float32, of an output that may be a dict with auxiliary heads."""
    main: Tensor = output["main"] if isinstance(output, dict) else output
    return main.float()


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
    """Compares what the teacher was trained on, where it knows (`galago.run.load` notes it), with these data.

    Raises:
        UserError: the two differ, so that the teacher would see images unlike those it knows.
    """
    known = getattr(teacher, "normalization", None)
    if not isinstance(known, Normalize):
        return
    for name in ("mean", "std"):
        its, ours = (list(map(float, getattr(norm, name).flatten())) for norm in (known, normalize))
        if len(its) != len(ours) or any(abs(a - b) > 1e-4 for a, b in zip(its, ours, strict=True)):
            raise UserError(
                f"the teacher was trained on images normalized with {name} {rounded(its)}, "
                f"these data use {rounded(ours)}; give both recipes the same normalization"
            )


def rounded(numbers: list[float]) -> list[float]:
    """To four digits, for a message."""
    return [round(number, 4) for number in numbers]
