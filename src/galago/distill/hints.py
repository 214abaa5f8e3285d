"""FitNets: hints, a layer of the model regressed on a layer of the teacher.

Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta, Yoshua Bengio, "FitNets: Hints for
Thin Deep Nets", ICLR 2015, arXiv:1412.6550.

A small regressor on top of a layer of the model predicts the teacher's features; its error teaches the layers below.

    L = mean (r(F^student) - F^teacher)²,   r = ReLU(BatchNorm(convolution))

The convolution is the first of these that fits: 3×3 with stride 2 where the model's map is twice as high; transposed
4×4 with stride 2 where it is half as high; otherwise, where it is as high or higher, one of (1 + the difference)
without padding, which is 1×1 for equal sizes.

When: a thin, deep model that learns badly from labels alone. It costs a convolution in each step; the regressor is
thrown away at the end.

Usual setting (public benchmark, and the defaults): weight 100, the second stage, together with the labels; the task's
own weight 1. The paper's two stages are two recipes: the first with hints alone (`task_weight: 0`), the second with
`galago.distill.logits.SoftTargets`, beginning with what the first left (`galago.quantize.two_steps.StartFrom`).

Recipe: recipes/distill/fitnet_resnet20_cifar10.yaml.

The regressor ends in a ReLU: name a layer of the teacher behind its ReLU, as the ends of stages are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen, View
from galago.distill.sizes import require_maps
from galago.errors import UserError
from galago.schedule import Schedule


def regressor(student: torch.Size, teacher: torch.Size) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU from one map's shape to another's.

    Args:
        student: N×C×H×W, what goes in.
        teacher: N×C×H×W, what is to come out.

    Raises:
        UserError: no convolution of these kinds leads from one to the other.

    >>> regressor(torch.Size([1, 3, 8, 8]), torch.Size([1, 4, 4, 4]))[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    """
    (_, width, *size), (_, wanted, *goal) = student, teacher
    convolution: nn.Module
    if size[0] == 2 * goal[0]:
        convolution = nn.Conv2d(width, wanted, 3, stride=2, padding=1)
    elif 2 * size[0] == goal[0]:
        convolution = nn.ConvTranspose2d(width, wanted, 4, stride=2, padding=1)
    elif all(own >= its for own, its in zip(size, goal, strict=True)):
        convolution = nn.Conv2d(width, wanted, (1 + size[0] - goal[0], 1 + size[1] - goal[1]))
    else:
        raise UserError(
            f"Hints: no regressor leads from a map of {size[0]}×{size[1]} to one of {goal[0]}×{goal[1]}; name layers"
            " where the model's map is as large as the teacher's, larger, or half as large"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted), nn.ReLU())


class Hints(Lesson):
    """Features of the teacher, predicted by regressors on features of the model.

    Args:
        weight: of this loss, or a schedule of it.
        layers: feature maps of the model, by path or number of stage; the last but one stage.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        weight: float | Schedule = 100.0,
        layers: Sequence[str | int] = (-2,),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        self.regressors = nn.ModuleList()

    def fit(self, student: View, teacher: View) -> None:
        require_maps(self, student, teacher)
        pairs = zip(student.features, teacher.features, strict=True)
        self.regressors = nn.ModuleList(regressor(own.shape, its.shape) for own, its in pairs)

    def forward(self, seen: Seen) -> Tensor:
        triples = zip(self.regressors, seen.student.features, seen.teacher.features, strict=True)
        return torch.stack([(regress(own) - its).square().mean() for regress, own, its in triples]).sum()

    def adapters(self) -> list[str]:
        convolutions = [part for part in self.regressors.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
        return [f"{type(part).__name__} {'×'.join(map(str, part.kernel_size))}" for part in convolutions]
