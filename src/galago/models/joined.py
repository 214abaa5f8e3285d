"""Joined: the embeddings of several trained networks side by side, and one linear classifier for them all.

Mariana-Iuliana Georgescu, Radu Tudor Ionescu, "Teacher-Student Training and Triplet Loss for Facial Expression
Recognition under Occlusion", ICPR 2020, arXiv:2008.01003, which so joins the student of knowledge distillation and the
student of the triplet loss.

    e_s(x) = what the classifier of student s takes in, of length 1
    scores = W [e_1(x); e_2(x); …] + b

Only W and b train. The students are frozen, BatchNorm's statistics included, and lose their own classifiers.

When: two trainings of the same network have learned different things, and the sum of their costs may be spent at
inference. Training costs the students' forward passes and a linear layer.

Usual setting (design choice; the paper's classifier is recalled to be a linear SVM): multinomial logistic regression
(`Classify`) with weight decay 1e-3, on the data that the students learned from.

Recipe: recipes/faces/joined.yaml.

Chosen here: any number of students, each given as any model is, mostly by `galago.run.load`. The classifier of a
network is its last linear layer. Weight decay acts on the bias too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from galago.data import Normalize
from galago.errors import UserError
from galago.layers import classifier, find, innermost, swap
from galago.spec import describe


class Joined(nn.Module):
    """Frozen students without their classifiers and a linear layer, N×C×H×W to class scores N×K.

    Args:
        students: networks for the same images, which end in a linear layer; it is taken away.
        classes: number of outputs.
    """

    def __init__(self, students: Sequence[nn.Module], classes: int) -> None:
        super().__init__()
        self.classes = classes
        heads = [classifier(student) for student in students]
        width = sum(_width(student, head) for student, head in zip(students, heads, strict=True))
        bare = [swap(student, head, nn.Identity()) for student, head in zip(students, heads, strict=True)]
        self.students = nn.ModuleList(bare).requires_grad_(False).eval()
        self.head = nn.Linear(width, classes)

    def train(self, mode: bool = True) -> Self:
        """As usual, except that the students stay in evaluation mode."""
        super().train(mode)
        self.students.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        embeddings = [nn.functional.normalize(student(x)) for student in self.students]
        scores: Tensor = self.head(torch.cat(embeddings, 1))
        return scores


def _width(student: nn.Module, head: str) -> int:
    """How many numbers a classifier takes in."""
    return int(innermost(find(student, head)).weight.shape[1])


def joined(students: Sequence[nn.Module], classes: int) -> nn.Module:
    """The embeddings of several trained networks side by side, and one linear classifier for them all.

    Args:
        students: trained networks for the same images and the same normalization.
        classes: number of outputs.

    Raises:
        UserError: there are no students, or they were trained on images normalized in different ways.
    """
    if not students:
        raise UserError("joined: students is empty; name the runs of the networks to join")
    known = [found for one in students if isinstance(found := getattr(one, "normalization", None), Normalize)]
    if any(
        not torch.equal(getattr(known[0], name), getattr(other, name)) for other in known for name in ("mean", "std")
    ):
        raise UserError("joined: the students were trained on images normalized in different ways; train them alike")
    model = Joined(students, classes)
    model.__dict__["built_from"] = describe(model)  # of networks without their runs, which the record must not read
    return model
