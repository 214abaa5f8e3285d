"""Knowledge distillation: learn a trained network's probabilities, not only the labels.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 Deep Learning
Workshop, arXiv:1503.02531.

A small network is trained to give the class probabilities of a larger, frozen one, both softened by a temperature.
How the teacher ranks the wrong classes says more about an image than its label does.

    p_T(z) = softmax(z / T)
    L = T² KL(p_T(z_teacher) ‖ p_T(z_student)),   KL averaged over the batch
    dL / dz_student = (T / N) (p_T(z_student) - p_T(z_teacher))

When: nearly always when a larger network for the same classes exists; also to bring a low-bit network close to its own
float self. It costs the teacher's forward pass in every step.

Usual setting (public benchmark, and the defaults here): T = 4, weight 0.9, `task_weight` 0.1 in `Distill`.
Recipe: recipes/distill/kd_resnet20_cifar10.yaml; recipes/demo/student.yaml uses it with quantization.
"""

from __future__ import annotations

from torch import Tensor

from galago.distill.divergence import softened_divergence
from galago.distill.lesson import Lesson, Seen, at
from galago.errors import UserError
from galago.schedule import Schedule


class SoftTargets(Lesson):
    """The teacher's softened class probabilities.

    Args:
        temperature: how much both distributions are softened; a schedule gives it by progress.
        weight: of this loss, or a schedule of it.
    """

    def __init__(self, temperature: float | Schedule = 4.0, weight: float | Schedule = 0.9) -> None:
        super().__init__(weight)
        if not isinstance(temperature, Schedule) and temperature <= 0:
            raise UserError(f"SoftTargets: temperature is {temperature}; give a positive number, usually 4")
        self.temperature = temperature

    def forward(self, seen: Seen) -> Tensor:
        return softened_divergence(seen.student.scores, seen.teacher.scores, at(self.temperature, seen.progress))
