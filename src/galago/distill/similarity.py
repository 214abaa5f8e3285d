"""SP: similarity-preserving distillation, images that are alike to the teacher are alike to the model.

Frederick Tung, Greg Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682.

    A = features, a row an image;   S = A Aᵀ, each row to length 1
    L = (1 / B²) Σ_layers ‖S^student - S^teacher‖²_F

Both matrices are B×B, whatever the networks' shapes: no adapters.

When: teacher and model of different families. It costs one product of B×B; more than a few images must be in a batch.

Usual setting (public benchmark, and the defaults): weight 3000, the last feature map; the task's own weight 1.

Recipe: recipes/distill/sp_resnet20_cifar10.yaml.

An image whose features are all zero has a row of zeros and no gradient (the official code returns gradients of 1e10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galago.distill.lesson import Lesson, Seen
from galago.schedule import Schedule


def similarities(feature: Tensor) -> Tensor:
    """Inner products B×B of features B×…, each row of length 1.

    >>> similarities(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    tensor([[1., 0.],
            [0., 1.]])
    """
    flat = feature.flatten(1)
    products = flat @ flat.T
    squared = products.square().sum(1, keepdim=True)
    length = torch.where(squared > 0, squared, 1.0).sqrt()  # masked in front of the root, whose slope at 0 is infinite
    return torch.where(squared > 0, products / length, 0.0)


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of both matrices, a scalar; features B×… of any two shapes."""
    return (similarities(student) - similarities(teacher)).square().mean()


class Similarity(Lesson):
    """Which images of a batch are alike.

    Args:
        weight: of this loss, or a schedule of it.
        layers: of the model, by path or number of stage; the last stage.
        teacher_layers: of the teacher, as many; the same as `layers` where none are named.
    """

    def __init__(
        self,
        weight: float | Schedule = 3000.0,
        layers: Sequence[str | int] = (-1,),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)

    def forward(self, seen: Seen) -> Tensor:
        pairs = zip(seen.student.features, seen.teacher.features, strict=True)
        return torch.stack([similarity_distance(own, its) for own, its in pairs]).sum()
