"""DKD: decoupled knowledge distillation, the target class and the others weighed apart.

Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu, Jiajun Liang, "Decoupled Knowledge Distillation", CVPR 2022,
arXiv:2203.08679.

Distillation's divergence is one of "target or not" plus one among the other classes, and the second is held down by how
sure the teacher is: by a factor 1 - b^t. Given a weight of its own, what the wrong classes say is heard for easy images
too.

    b = p_T(y),   q = softmax of z / T over the K - 1 other classes
    L = T² mean [ α KL([b^t, 1 - b^t] ‖ [b^s, 1 - b^s]) + β KL(q^t ‖ q^s) ]

When: in place of `galago.distill.logits.SoftTargets` where a good teacher gains little; more classes, more gain. It
costs as much.

Usual setting (CIFAR-100, and the defaults): α = 1, β = 8, T = 4, the task's own weight 1; this loss's weight rises in a
line to 1 over the first 20 of 240 epochs, which the recipe has as a schedule in its place. α = 1 and β = 1 - b^t would
be SoftTargets.

Recipe: recipes/distill/dkd_resnet20_cifar10.yaml.

Chosen here: y is the class with the largest probability of the target, so that mixed or smoothed labels have one too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen
from galago.errors import UserError
from galago.schedule import Schedule


def decoupled_divergence(
    student: Tensor, teacher: Tensor, label: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """The loss above, a scalar.

    Args:
        student: scores N×K.
        teacher: scores N×K, taken as constant.
        label: class numbers, N.
        alpha: weight of "target or not".
        beta: weight of the others among themselves.
        temperature: T.
    """
    target = nn.functional.one_hot(label, student.shape[1]).bool()
    (own, own_others), (its, its_others) = (
        parts(scores / temperature, target) for scores in (student, teacher.detach())
    )
    hit = nn.functional.kl_div(own, its, reduction="batchmean", log_target=True)
    others = nn.functional.kl_div(own_others, its_others, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * hit + beta * others)


def parts(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target and not target, N×2, and of the other classes among themselves, N×(K-1)."""
    count, classes = scores.shape
    others = scores[~target].view(count, classes - 1)
    both = torch.stack([scores[target], others.logsumexp(1)], 1)
    return both.log_softmax(1), others.log_softmax(1)


class Decoupled(Lesson):
    """Whether it is the target class, and what the other classes are among themselves, each with its own weight.

    Args:
        alpha: weight of the first part.
        beta: weight of the second.
        temperature: how much distributions are softened.
        weight: of this loss, or a schedule of it.
    """

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise UserError(f"Decoupled: temperature is {temperature}; give a positive number, usually 4")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, seen: Seen) -> Tensor:
        label = seen.batch.target.argmax(1)
        return decoupled_divergence(
            seen.student.scores, seen.teacher.scores, label, self.alpha, self.beta, self.temperature
        )
