"""Knowledge adjustment (KA): a teacher that is wrong about a training image is put right before it teaches.

Tiancheng Wen, Shenqi Lai, Xueming Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision",
arXiv:1911.07471; as the only target of a model that may abstain (`galago.tasks.abstain`), Xu Yi, Jian Pu, Hui Zhao,
"Knowledge Distillation with a Precise Teacher and Prediction with Abstention", ICPR 2020 (no public code).

Where the teacher's likeliest class is not the label, the two change places; so the teacher is never wrong, and still
says how much the other classes resemble the image.

    q = softmax(z^t / T),   c = argmax q,   y the label
    probability shift:  q_c ↔ q_y where c ≠ y;              other rows stay as they are
    label smoothing:    q_y = p, the others (1 - p) / (m - 1) where c ≠ y

`AdjustedTargets` puts q in the labels' place, so that it is all that is learned: with `Classify` by cross-entropy, with
`ClassifyOrAbstain` by the soft gambler loss of the second paper. `Adjusted` shifts what another lesson of
`galago.distill.distill.Distill` hears, such as `SoftTargets`, which then stands beside the task's own loss.

When: the labels are clean (it writes their noise into the teacher) and the teacher is wrong on some of the training
images. It costs the teacher's forward pass in every step.

Usual setting (a public library): T = 20 beside the labels, weight 0.5 for the shift, 0.85 and p = 0.9 for smoothing.
The second paper's are unknown; T = 4 is a design choice. The softer the targets, the more the gambler loss holds back:
with it give `ClassifyOrAbstain` a `pretraining`, or whole classes may never be bet on (tried on digits).

Recipe: recipes/distill/abstain_resnet20_cifar10.yaml.

Chosen here: where classes are equally likely, the first is the teacher's. y is the class with the largest probability
of the target. List `AdjustedTargets` in front of methods that mix images: it then sees clean images with their labels,
and what it says is mixed; behind them it puts the larger share's class first. The shift moves scores as it moves
probabilities, so `Adjusted` works at any temperature; smoothing is for `AdjustedTargets` only. The definition of the
shift is recalled from the first paper.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.lesson import Lesson, Seen, View
from galago.distill.teacher import require_classes, require_same_normalization, scores
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of, normalized


def shifted(rows: Tensor, label: Tensor) -> Tensor:
    """Each row with its largest entry and its label's in each other's place.

    Args:
        rows: probabilities or scores, N×m.
        label: class numbers, N.

    >>> shifted(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]), torch.tensor([1, 1]))
    tensor([[0.2000, 0.7000, 0.1000],
            [0.1000, 0.6000, 0.3000]])
    """
    both = torch.stack([rows.argmax(1), label], 1)
    return rows.scatter(1, both, rows.gather(1, both.flip(1)))


def smoothed(rows: Tensor, label: Tensor, confidence: float) -> Tensor:
    """Rows whose largest entry is not their label's replaced by smoothed labels.

    Args:
        rows: probabilities N×m.
        label: class numbers, N.
        confidence: p, of the label.

    >>> smoothed(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]), torch.tensor([1, 1]), 0.9)
    tensor([[0.0500, 0.9000, 0.0500],
            [0.1000, 0.6000, 0.3000]])
    """
    others = (1 - confidence) / (rows.shape[1] - 1)
    certain = torch.full_like(rows, others).scatter(1, label[:, None], confidence)
    return torch.where((rows.argmax(1) == label)[:, None], rows, certain)


class AdjustedTargets(Method):
    """A frozen teacher's class probabilities in the labels' place, put right where they are wrong.

    Args:
        teacher: a trained network for the data's classes and the same normalization.
        temperature: how much its probabilities are softened.
        confidence: p of the smoothed labels that replace wrong rows; without it, wrong rows are shifted.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 4.0, confidence: float | None = None) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"AdjustedTargets: temperature is {temperature}; give a positive number, usually 4")
        if confidence is not None and not 0 < confidence <= 1:
            raise UserError(f"AdjustedTargets: confidence is {confidence}; give a probability, usually 0.9")
        self.teacher = teacher.requires_grad_(False).eval()
        self.temperature, self.confidence = temperature, confidence

    def train(self, mode: bool = True) -> Self:
        """As usual, except that the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing; looks whether the teacher can teach.

        Raises:
            UserError: it knows other classes or another normalization, or is damaged.
        """
        require_same_normalization(self.teacher, data.normalize)
        image = normalized(data, data.example()[:1], device_of(model))
        self.teacher.to(image.device)
        with torch.no_grad():
            require_classes(scores(self.teacher(image)), len(data.classes))
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        return inner(batch._replace(target=self.target(batch)))

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        """q, N×m, of normalized images and their labels."""
        said = (scores(self.teacher(batch.input)) / self.temperature).softmax(1)
        label = batch.target.argmax(1)
        return shifted(said, label) if self.confidence is None else smoothed(said, label, self.confidence)


class Adjusted(Lesson):
    """Another lesson, in which the teacher's largest score and the label's change places where it is wrong.

    Args:
        lesson: one on scores, such as `galago.distill.logits.SoftTargets`; its weight counts.
    """

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson.weight)
        if lesson.layers:
            raise UserError(
                f"Adjusted: {type(lesson).__name__} compares layers, which know no label; name one on scores"
            )
        self.lesson = lesson

    def fit(self, student: View, teacher: View) -> None:
        self.lesson.fit(student, teacher)

    def forward(self, seen: Seen) -> Tensor:
        right = shifted(seen.teacher.scores, seen.batch.target.argmax(1))
        loss: Tensor = self.lesson(seen._replace(teacher=seen.teacher._replace(scores=right)))
        return loss
