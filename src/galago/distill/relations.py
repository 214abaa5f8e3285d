"""RKD: relational knowledge distillation, distances and angles between images.

Wonpyo Park, Dongju Kim, Yan Lu, Minsu Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068.

Not what the teacher makes of one image is copied but how images lie to each other: all distances of two, relative to
their mean, and all angles of three. Embeddings may have different sizes; there are no adapters.

    ψ_D(i, j) = ‖f_i - f_j‖ / μ,   μ = mean over i ≠ j
    ψ_A(i, j, k) = ⟨e_ij, e_kj⟩,   e_ij = (f_i - f_j) / ‖f_i - f_j‖
    L = λ_D mean_{B²} H(ψ_D^student - ψ_D^teacher) + λ_A mean_{B³} H(ψ_A^student - ψ_A^teacher),   H Huber's, δ = 1

When: metric learning first of all; for classification a companion of the probabilities. Angles cost B³ numbers, 2
million for a batch of 128.

Usual setting (classification, and the defaults): λ_D = 25, λ_A = 50, weight 1; the task's own weight 1.

Recipe: recipes/distill/rkd_resnet20_cifar10.yaml.

The embedding is the mean over height and width of the layer's map, of the last stage where none is named. Where two
images of a batch coincide, their distance counts as the square root of 1e-12 and their direction as zero, with no
gradient (the official code returns gradients of 1e9 there).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen, pooled
from galago.schedule import Schedule

SMALLEST = 1e-12  # squared distance


def relative_distances(embedding: Tensor) -> Tensor:
    """Distances B×B of embeddings B×d, over the mean of those between different images.

    >>> relative_distances(torch.tensor([[0.0], [3.0]]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    other = ~torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    squared = (embedding.unsqueeze(0) - embedding.unsqueeze(1)).square().sum(2)
    distances = squared.clamp_min(SMALLEST).sqrt() * other
    return distances / (distances.sum() / (len(embedding) * (len(embedding) - 1)))


def angles(embedding: Tensor) -> Tensor:
    """Cosines B×B×B: at image j, between images i and k, as [j, i, k].

    >>> angles(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))[0, 1, 2]
    tensor(0.)
    """
    towards = embedding.unsqueeze(0) - embedding.unsqueeze(1)  # [j, i]: from j to i
    squared = towards.square().sum(2, keepdim=True)
    apart = squared > 0
    length = torch.where(apart, squared, 1.0).sqrt()  # masked in front of the root, whose slope at 0 is infinite
    direction = torch.where(apart, towards / length, 0.0)
    return torch.bmm(direction, direction.transpose(1, 2))


def relational_distance(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both terms, of distances and of angles, two scalars; embeddings B×d of any two sizes, B at least 2."""
    with torch.no_grad():
        wanted = relative_distances(teacher), angles(teacher)
    own = relative_distances(student), angles(student)
    distance, angle = (nn.functional.smooth_l1_loss(a, b) for a, b in zip(own, wanted, strict=True))
    return distance, angle


class Relations(Lesson):
    """How the images of a batch lie to each other.

    Args:
        distance_weight: of distances of two.
        angle_weight: of angles of three.
        weight: of the sum, or a schedule of it.
        layers: one layer of the model, by path or number of stage; the last stage.
        teacher_layers: one of the teacher; the same where none is named.
    """

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        weight: float | Schedule = 1.0,
        layers: Sequence[str | int] = (-1,),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, seen: Seen) -> Tensor:
        if len(seen.student.scores) < 2:  # nothing to relate
            return seen.student.scores.sum() * 0
        total = torch.zeros((), device=seen.student.scores.device)
        for own, its in zip(seen.student.features, seen.teacher.features, strict=True):
            distance, angle = relational_distance(pooled(own), pooled(its))
            total = total + self.distance_weight * distance + self.angle_weight * angle
        return total
