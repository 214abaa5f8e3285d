"""CRD: contrastive representation distillation, each image's embedding as the teacher has it, and no other image's.

Yonglong Tian, Dilip Krishnan, Phillip Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.

Two linear layers embed the features of both networks in one space. What the model makes of an image is to be near what
the teacher makes of the same image and far from what it makes of thousands of others, and the other way round; the
others come from memories of every training image's embedding.

    v = embed(f) / ‖embed(f)‖,   M_j the embedding of image j when it was seen last
    P^student_k = exp(⟨M^teacher_k, v^student⟩ / τ) / Z^student,   and P^teacher with both sides exchanged
    L = Σ_both -mean_i [ log(P_i / (P_i + c + ε)) + Σ_k log(c / (P_k + c + ε)) ],   c = negatives / images,   ε = 1e-7
    then M_i ← (m M_i + (1 - m) v_i) / ‖·‖

i is the image itself, k runs over the negatives. Z is set once, on the first batch: the mean of exp over all its pairs,
times the number of images.

When: a teacher of another family, or where the features will be used for something else. The memories take 8 d bytes an
image, on the device and in every checkpoint (51 MB for CIFAR-10, 1.3 GB for ImageNet); each step multiplies its batch
with both of them.

Usual setting (public benchmark, and the defaults): τ = 0.07, m = 0.5, 16384 negatives, d = 128, weight 0.8; the task's
own weight 1.

Recipe: recipes/distill/crd_resnet20_cifar10.yaml.

Chosen here: negatives are drawn evenly, with replacement, from all other images of the full training set, whatever
their class, by torch's generator. Rows of images that are held out or left out by `per_class` keep their random start
and stand for images that are like no other. The embedding is of the mean over height and width of the layer's map, of
the last stage where none is named. A mixed image (`CutMix`, `Mixup`) counts as the image that something was mixed
into: its index is that one's, its positive and what is remembered are those of the mixture. All this is computed in
float32. Several processes remember the images of the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen, View, pooled
from galago.errors import UserError
from galago.schedule import Schedule

EPSILON = 1e-7


def contrastive_loss(probability: Tensor, share: float) -> Tensor:
    """`-mean_i [ log(P_i0 / (P_i0 + c + ε)) + Σ_k log(c / (P_ik + c + ε)) ]`, a scalar.

    Args:
        probability: P, B×(1 + negatives), not normalized; an image's own first.
        share: c, the number of negatives over that of all images.

    >>> contrastive_loss(torch.tensor([[1.0, 0.0, 0.0]]), 1.0)
    tensor(0.6931)
    """
    below = probability + share + EPSILON
    own = (probability[:, 0] / below[:, 0]).log()
    others = (share / below[:, 1:]).log().sum(1)
    return -(own + others).mean()


def draw_pairs(index: Tensor, images: int, negatives: int) -> Tensor:
    """Each image's own number and those of others, drawn evenly and with replacement, B×(1 + negatives).

    >>> draw_pairs(torch.tensor([1]), images=2, negatives=3)
    tensor([[1, 0, 0, 0]])
    """
    own = index.unsqueeze(1)
    further = torch.randint(1, images, (len(index), negatives), device=index.device)
    return torch.cat([own, (own + further) % images], 1)


class Memory(nn.Module):
    """One network's embedding of every training image, as it was when the image was last seen.

    Args:
        images: how many.
        size: d, of an embedding.
    """

    rows: Tensor
    normalizer: Tensor

    def __init__(self, images: int, size: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / size)  # rows begin with length 1 on average
        self.register_buffer("rows", torch.empty(images, size).uniform_(-bound, bound))
        self.register_buffer("normalizer", torch.zeros(()))  # Z; 0 until the first batch

    def compare(self, anchor: Tensor, pairs: Tensor, temperature: float) -> Tensor:
        """P, B×(1 + negatives): the other network's embeddings B×d compared with the rows named in `pairs`."""
        rows = self.rows.clone()  # for the backward pass, as `remember` writes into them
        similarity = torch.exp((anchor @ rows.T).gather(1, pairs) / temperature)
        first = similarity.detach().mean() * len(rows)
        normalizer = torch.where(self.normalizer > 0, self.normalizer, first)
        if self.training:
            self.normalizer.copy_(normalizer)
        return similarity / normalizer

    @torch.no_grad()
    def remember(self, embedding: Tensor, index: Tensor, momentum: float) -> None:
        """Moves the rows of these images, B, towards their embeddings, B×d."""
        moved = momentum * self.rows[index] + (1 - momentum) * embedding
        self.rows.index_copy_(0, index, nn.functional.normalize(moved))


class Contrastive(Lesson):
    """An image's embedding close to the teacher's of the same image, far from the teacher's of others.

    Args:
        negatives: other images that each image is told from.
        temperature: τ, what similarities are divided by.
        momentum: m, how much of an old embedding stays when its image is seen again.
        size: d, of the embeddings.
        weight: of this loss, or a schedule of it.
        layers: one layer of the model, by path or number of stage; the last stage.
        teacher_layers: one of the teacher; the same where none is named.
    """

    def __init__(
        self,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        size: int = 128,
        weight: float | Schedule = 0.8,
        layers: Sequence[str | int] = (-1,),
        teacher_layers: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__(weight, layers, teacher_layers)
        if len(self.layers) != 1:
            raise UserError(f"Contrastive compares one layer of each network, not {len(self.layers)}; name one")
        if temperature <= 0:
            raise UserError(f"Contrastive: temperature is {temperature}; give a positive number, usually 0.07")
        if negatives < 1 or not 0 <= momentum < 1:
            raise UserError(f"Contrastive: negatives {negatives} must be at least 1, momentum {momentum} in [0, 1)")
        self.negatives, self.temperature, self.momentum, self.size = negatives, temperature, momentum, size
        self.embeds, self.memories = nn.ModuleList(), nn.ModuleList()  # the model's and the teacher's

    def fit(self, student: View, teacher: View) -> None:
        if self.images is None or self.images < 2:
            raise UserError(
                "Contrastive remembers every training image, but these data do not say how many there are;"
                " give your data class an attribute `images`"
            )
        widths = [pooled(view.features[0]).shape[1] for view in (student, teacher)]
        self.embeds = nn.ModuleList(nn.Linear(width, self.size) for width in widths)
        self.memories = nn.ModuleList(Memory(self.images, self.size) for _ in widths)

    def forward(self, seen: Seen) -> Tensor:
        index = seen.batch.extra.get("index")
        if index is None:
            raise UserError(
                "Contrastive: these data do not say which images are in a batch;"
                " have them give each image's position in the training set as `extra['index']`"
            )
        with torch.autocast(index.device.type, enabled=False):
            return self.contrast(seen, index, draw_pairs(index, len(self._memories()[0].rows), self.negatives))

    def contrast(self, seen: Seen, index: Tensor, pairs: Tensor) -> Tensor:
        """The loss for given pairs, as `draw_pairs` draws them; in training, both memories are brought up to date."""
        own, its = self.embedded(seen.student, 0), self.embedded(seen.teacher, 1)
        mine, theirs = self._memories()
        share = self.negatives / len(mine.rows)
        told = theirs.compare(own, pairs, self.temperature), mine.compare(its, pairs, self.temperature)
        loss = contrastive_loss(told[0], share) + contrastive_loss(told[1], share)
        if self.training:
            mine.remember(own, index, self.momentum)
            theirs.remember(its, index, self.momentum)
        return loss

    def embedded(self, view: View, number: int) -> Tensor:
        """v, B×d, each of length 1."""
        return nn.functional.normalize(self.embeds[number](pooled(view.features[0])))

    def _memories(self) -> list[Memory]:
        return [memory for memory in self.memories if isinstance(memory, Memory)]

    def adapters(self) -> list[str]:
        return [f"linear, to {self.size} numbers each"]
