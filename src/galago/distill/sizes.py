"""Feature maps of different sizes brought together: what lessons that compare maps have in common."""

from __future__ import annotations

from torch import Tensor, nn

from galago.distill.lesson import Lesson, View
from galago.errors import UserError


def to_one_size(*maps: Tensor) -> list[Tensor]:
    """All maps N×C×H×W at the smallest height and width among them, by averages.

    >>> import torch
    >>> a, b = to_one_size(torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4))
    >>> a.shape, b.shape
    (torch.Size([1, 2, 4, 4]), torch.Size([1, 3, 4, 4]))
    """
    size = (min(one.shape[2] for one in maps), min(one.shape[3] for one in maps))
    return [nn.functional.adaptive_avg_pool2d(one, size) if one.shape[2:] != size else one for one in maps]


def require_maps(lesson: Lesson, student: View, teacher: View) -> None:
    """All that is compared has height and width.

    Raises:
        UserError: naming the layer that has not.
    """
    for paths, view, whose in ((lesson.paths, student, "model"), (lesson.teacher_paths, teacher, "teacher")):
        for path, feature in zip(paths, view.features, strict=True):
            if feature.ndim != 4:
                raise UserError(
                    f"{type(lesson).__name__}: layer {path!r} of the {whose} gives {'×'.join(map(str, feature.shape))},"
                    " no feature map N×C×H×W; name a layer that does"
                )
