"""DIST: distillation from a stronger teacher, by correlation in place of equality.

Tao Huang, Shan You, Fei Wang, Chen Qian, Chang Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
arXiv:2205.10536.

A much stronger teacher's probabilities are out of a small student's reach. What is asked here is only that the student
rank the classes of an image alike, and the images of a class alike: Pearson's correlation along both axes, which a
scale and a shift of the predictions leave alone.

    p = softmax(z / τ),   ρ(a, b) = ⟨a - ā, b - b̄⟩ / (‖a - ā‖ ‖b - b̄‖ + 1e-8)
    L = τ² [ β (1 - mean_n ρ(p^s_n, p^t_n)) + γ (1 - mean_k ρ(p^s_·k, p^t_·k)) ]

When: the teacher is much larger or trained with strong augmentation. It costs as much as
`galago.distill.logits.SoftTargets`; batches should be large enough to hold several images of a class.

The official function has τ = 1 and β = γ = 1, the defaults here.

Recipe: recipes/distill/dist_resnet20_cifar10.yaml.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galago.distill.lesson import Lesson, Seen
from galago.errors import UserError
from galago.schedule import Schedule


def correlation(one: Tensor, other: Tensor, axis: int) -> Tensor:
    """Pearson's ρ along an axis; that axis is gone from the result.

    >>> correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 7.0, 9.0]]), 1).item() > 0.9999
    True
    """
    one, other = one - one.mean(axis, keepdim=True), other - other.mean(axis, keepdim=True)
    lengths = torch.linalg.vector_norm(one, dim=axis) * torch.linalg.vector_norm(other, dim=axis)
    found: Tensor = (one * other).sum(axis) / (lengths + 1e-8)
    return found


def uncorrelated(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """The loss above, a scalar, of scores N×K; the teacher's are taken as constant."""
    own, its = (student / temperature).softmax(1), (teacher.detach() / temperature).softmax(1)
    within, among = (1 - correlation(own, its, axis).mean() for axis in (1, 0))
    return temperature**2 * (beta * within + gamma * among)


class Correlation(Lesson):
    """Classes of an image, and images of a class, in the teacher's proportions.

    Args:
        beta: weight of the classes of an image.
        gamma: weight of the images of a class.
        temperature: how much distributions are softened.
        weight: of this loss, or a schedule of it.
    """

    def __init__(
        self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise UserError(f"Correlation: temperature is {temperature}; give a positive number, usually 1")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, seen: Seen) -> Tensor:
        return uncorrelated(seen.student.scores, seen.teacher.scores, self.beta, self.gamma, self.temperature)
