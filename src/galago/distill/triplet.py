"""OccFace-KD: a triplet loss across two networks, for a model that sees less than its teacher.

Mariana-Iuliana Georgescu, Radu Tudor Ionescu, "Teacher-Student Training and Triplet Loss for Facial Expression
Recognition under Occlusion", ICPR 2020, arXiv:2008.01003.

The teacher sees the whole image x, the model the same image x° with a part hidden. Each image of the model is drawn
towards what the teacher makes of its class, and pushed away from what the model itself makes of other classes.

    a_i = e^model(x°_i)      p_j = e^teacher(x_j), y_j = y_i      n_k = e^model(x°_k), y_k ≠ y_i
    L = mean relu(‖a - p‖² - ‖a - n‖² + m),   over the anchors that have a negative, zero terms included

Embeddings e are what the classifier takes in, of length 1. Gradients pass through a and n, none through p. Which p and
n meet an anchor is a mining rule: `Random`; `SemiHard`, a random positive and the closest negative that is farther
away than it, or the farthest negative of all where there is none; `BatchHard`, the farthest positive and the closest
negative; `All` of them.

When: the model sees less than is known while training: a covered face, a cropped object, a cheaper camera. Batches
must hold several images of several classes (`together` of an image data set). It costs N×N distances; `All` needs
several N³ numbers, 2 million for a batch of 128. `galago.distill.logits` is the paper's other way to teach such a
model, and `galago.models.joined` joins both students.

Usual setting (design choice, as the paper's numbers are not known; and the defaults): m = 0.2, `SemiHard`, batches of 8
classes with 8 images each; the task's own loss at weight 1; `view: full` in `Distill`, and in the list of methods
`galago.augment.occlude.Occlude`, which hides a part and keeps the whole.

Recipe: recipes/faces/triplet.yaml.

Chosen here: the formula and the mining rules (the abstract says in words what is compared); the task's own loss beside
it, so that this student can classify alone. A mixed target counts as its most likely class. A batch of one class gives
a loss of 0; an embedding of zeros has no direction and stays. Random numbers are drawn on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galago.distill.lesson import Lesson, Seen, View, pooled
from galago.errors import UserError
from galago.schedule import Schedule
from galago.taps import CLASSIFIER


class Triplets(NamedTuple):
    """T triplets of a batch, by position. Those that are not `real` (no negative, another class) do not count."""

    anchor: Tensor  # of the model
    positive: Tensor  # of the teacher
    negative: Tensor  # of the model
    real: Tensor  # bool


def unit(embedding: Tensor) -> Tensor:
    """Embeddings N×d brought to length 1; one of zeros stays.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    squared = embedding.square().sum(1, keepdim=True)
    length = torch.where(squared > 0, squared, 1.0).sqrt()  # masked in front of the root, whose slope at 0 is infinite
    return embedding / length


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """‖a - b‖², N×M, of embeddings N×d and M×d.

    >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[25.,  1.]])
    """
    return (first.unsqueeze(1) - second.unsqueeze(0)).square().sum(2)


def triplet_loss(to_teacher: Tensor, to_model: Tensor, chosen: Triplets, margin: float) -> Tensor:
    """`mean relu(‖a - p‖² - ‖a - n‖² + m)` over the real triplets, a scalar; 0 where there are none.

    Args:
        to_teacher: squared distances N×N from anchors to the teacher's embeddings.
        to_model: from anchors to the model's own.
        chosen: which of them.
        margin: m.
    """
    gap = to_teacher[chosen.anchor, chosen.positive] - to_model[chosen.anchor, chosen.negative]
    return ((gap + margin).relu() * chosen.real).sum() / chosen.real.sum().clamp_min(1)


def random_of(allowed: Tensor) -> Tensor:
    """For each row of a bool N×M one of the columns where it is true, each as likely; N indices.

    >>> random_of(torch.eye(3, dtype=torch.bool))
    tensor([0, 1, 2])
    """
    drawn = torch.rand(allowed.shape, device="cpu").to(allowed.device)
    return torch.where(allowed, drawn, -1.0).argmax(1)


def semihard_negative(to_positive: Tensor, to_model: Tensor, other: Tensor) -> Tensor:
    """The closest negative that is farther away than the positive; the farthest where there is none. N indices.

    Args:
        to_positive: squared distance of each anchor to its positive, N.
        to_model: of each anchor to the model's embeddings, N×N.
        other: whether the class is another one, N×N.
    """
    farther = other & (to_model > to_positive.unsqueeze(1))
    closest = torch.where(farther, to_model, torch.inf).argmin(1)
    farthest = torch.where(other, to_model, -torch.inf).argmax(1)
    return torch.where(farther.any(1), closest, farthest)


class Mining(ABC):
    """A rule that chooses triplets by distance. Its state is nothing, its random numbers are torch's."""

    @abstractmethod
    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        """The triplets of a batch.

        Args:
            to_teacher: squared distances N×N from the model's embeddings to the teacher's.
            to_model: from the model's embeddings to the model's own.
            same: whether two images are of one class, N×N.
        """


class Random(Mining):
    """One positive and one negative for each anchor, by chance."""

    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        return _for_each(random_of(same), random_of(~same), same)


class SemiHard(Mining):
    """A random positive, and the closest negative that is farther away than it."""

    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        positive = random_of(same)
        to_positive = to_teacher.gather(1, positive.unsqueeze(1)).squeeze(1)
        return _for_each(positive, semihard_negative(to_positive, to_model, ~same), same)


class BatchHard(Mining):
    """The farthest positive and the closest negative."""

    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        farthest = torch.where(same, to_teacher, -torch.inf).argmax(1)
        return _for_each(farthest, torch.where(same, torch.inf, to_model).argmin(1), same)


class All(Mining):
    """Every triplet of the batch."""

    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        place = torch.arange(len(same), device=same.device)
        anchor, positive, negative = (axis.flatten() for axis in torch.meshgrid(place, place, place, indexing="ij"))
        return Triplets(anchor, positive, negative, same[anchor, positive] & ~same[anchor, negative])


def _for_each(positive: Tensor, negative: Tensor, same: Tensor) -> Triplets:
    """One triplet for each anchor; not real where all images are of its class."""
    return Triplets(torch.arange(len(same), device=same.device), positive, negative, ~same.all(1))


class CrossTriplet(Lesson):
    """The model's images closer to the teacher's images of their class than to the model's own of other classes.

    Args:
        margin: by how much closer, in squared distance of embeddings of length 1 (which is 4 at most).
        mining: which positives and negatives an anchor meets.
        weight: of the loss, or a schedule of it.
        layers: one layer of the model, by path or number of stage; what its classifier takes in.
        teacher_layers: one of the teacher; the same where none is named.
    """

    def __init__(
        self,
        margin: float = 0.2,
        mining: Mining = SemiHard(),  # noqa: B008 - has no state
        weight: float | Schedule = 1.0,
        layers: Sequence[str | int] = (CLASSIFIER,),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        if margin <= 0:
            raise UserError(f"CrossTriplet: margin is {margin:g}; give a positive number, usually 0.2")
        if len(self.layers) != 1:
            raise UserError(f"CrossTriplet: {len(self.layers)} layers are named; name the one that gives the embedding")
        self.margin, self.mining = margin, mining

    def fit(self, student: View, teacher: View) -> None:
        """Builds nothing; refuses embeddings of different sizes, between which there is no distance."""
        own, its = (pooled(view.features[0]).shape[1] for view in (student, teacher))
        if own != its:
            raise UserError(
                f"CrossTriplet: the model's embedding has {own} numbers, the teacher's {its};"
                " name layers that give as many, or take a teacher of the model's kind"
            )

    def forward(self, seen: Seen) -> Tensor:
        own, its = (unit(pooled(view.features[0])) for view in (seen.student, seen.teacher))
        label = seen.batch.target.argmax(1)
        to_teacher, to_model = squared_distances(own, its.detach()), squared_distances(own, own)
        with torch.no_grad():
            chosen = self.mining(to_teacher, to_model, label.unsqueeze(1) == label.unsqueeze(0))
        return triplet_loss(to_teacher, to_model, chosen, self.margin)
