"""Knowledge distillation: learn a trained network's probabilities, not only the labels.

Geoffrey Hinton, Oriol Vinyals, Jeff Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 Deep Learning
Workshop, arXiv:1503.02531.

A small network is trained to give the class probabilities of a larger, frozen one, both softened by a temperature.
How the teacher ranks the wrong classes says more about an image than its label does.

    p_T(z) = softmax(z / T)
    L = γ L_task + α T² KL(p_T(z_teacher) ‖ p_T(z_student)),   KL averaged over the batch
    dL_KD / dz_student = (T / N) (p_T(z_student) - p_T(z_teacher))

When: nearly always when a larger network for the same classes exists; also to bring a low-bit network close to its own
float self. It costs the teacher's forward pass in every step.

Usual setting (public benchmark, and the defaults here): T = 4, α = 0.9, γ = 0.1. `recipes/demo/student.yaml` uses it.

Chosen here: the teacher sees the batch as the model saw it, mixed images included, so its answer is about the same
image. γ weighs the task's own losses only, not those of other methods; it is 1 - α unless given. Where an output is a
dict, its entry `main` is distilled. The teacher stays in evaluation mode, and is kept in the checkpoint: an exact
resume then does not depend on whether the teacher's own run has changed in the meantime. The finished model holds
nothing of it.
"""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data, Normalize
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² KL(p_T(teacher) ‖ p_T(student))`, averaged over the batch; T² keeps the gradient's size. A scalar.

    Args:
        student: scores N×K.
        teacher: scores N×K, taken as constant.
        temperature: T, positive.

    >>> softened_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 5.0]]), 4.0).abs() < 1e-6
    tensor(True)
    """
    log_student = nn.functional.log_softmax(student / temperature, 1)
    log_teacher = nn.functional.log_softmax(teacher.detach() / temperature, 1)
    return nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def scores(output: Any) -> Tensor:
    """The class scores N×K in float32, of an output that may be a dict with auxiliary heads."""
    main: Tensor = output["main"] if isinstance(output, dict) else output
    return main.float()


class DistillLogits(Method):
    """Pulls the model's softened class probabilities towards a frozen teacher's.

    Args:
        teacher: a trained network for the same classes and the same normalization.
        temperature: how much both distributions are softened.
        weight: of this loss.
        task_weight: of the task's own losses; 1 - weight where not given.
    """

    def __init__(
        self, teacher: nn.Module, temperature: float = 4.0, weight: float = 0.9, task_weight: float | None = None
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"DistillLogits: temperature is {temperature}; give a positive number, usually 4")
        self.teacher = teacher.requires_grad_(False).eval()
        self.temperature, self.weight, self.task_weight = temperature, weight, task_weight

    def train(self, mode: bool = True) -> Self:
        """As usual, except that the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing; a teacher that cannot teach this model is an error before any training.

        Raises:
            UserError: other classes, or another normalization, than the model's.
        """
        require_same_normalization(self.teacher, data.normalize)
        teacher, student = classes_of(self.teacher, data), classes_of(model, data)
        if teacher != student:
            raise UserError(
                f"DistillLogits: the teacher tells {teacher} classes apart, the model {student}; "
                "give a teacher that was trained for the model's classes"
            )
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        with torch.no_grad():
            wanted = scores(self.teacher(step.batch.input))
            own = inner.task.losses(step.output, step.batch).keys()  # other methods' losses keep their weights
        share = 1 - self.weight if self.task_weight is None else self.task_weight
        losses = {name: share * loss if name in own else loss for name, loss in step.losses.items()}
        distillation = softened_divergence(scores(step.output), wanted, self.temperature)
        return step._replace(losses=losses).add(distillation=self.weight * distillation)


def classes_of(network: nn.Module, data: Data) -> int:
    """How many scores a network gives an image of these data. A copy is asked, so the network is not touched."""
    device = device_of(network)
    example, asked = data.normalize(data.example()).to(device), copy.deepcopy(network).eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return scores(asked(example)).shape[1]


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
                f"DistillLogits: the teacher was trained on images normalized with {name} {rounded(its)}, "
                f"these data use {rounded(ours)}; give both recipes the same normalization"
            )


def rounded(numbers: list[float]) -> list[float]:
    """To four digits, for a message."""
    return [round(number, 4) for number in numbers]
